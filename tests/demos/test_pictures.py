"""What is refused or marked because pictures could not be compared: other sizes, values that are no picture, judges of
pairs; and how the command begins."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from diffalign.demo.engine import Limits
from diffalign.demo.models import parse_model
from diffalign.errors import ConfigError
from diffalign.pipelines import load_pipeline
from reward_models import RewardModelError


def drawn(engine, ask):
    return [picture for part in engine.compare(ask, engine.sessions["page"]) for picture in part]


class Judge:
    """Compares pairs."""

    name, identity = "judge", {"id": "judge"}

    def compare(self, pairs, prompts):
        return torch.full((len(pairs),), 0.5)


def test_models_of_another_size_are_not_compared_until_one_size_is_given(make_engine, ask, weights, tmp_path):
    large = load_pipeline(str(weights["other"]))
    large.unet.register_to_config(sample_size=2 * large.unet.config.sample_size)
    large.default_sample_size = large.unet.config.sample_size
    large.save_pretrained(tmp_path / "large")
    engine = make_engine("base", limits=Limits(steps=10, side=256))
    engine.add(parse_model(f"large={tmp_path / 'large'}"))
    with pytest.raises(ConfigError, match=r"base draws (\d+) x \1 pixels and large draws .* give one size") as caught:
        drawn(engine, ask("base", "large"))
    assert "\n" not in str(caught.value)
    assert {picture.size for picture in drawn(engine, ask("base", "large", side=64))} == {(64, 64)}


def test_values_that_are_no_picture_are_said_to_be_and_not_scored(make_engine, ask):
    engine = make_engine("other")
    pipeline = engine.pool.pipeline(engine.specs["other"].base)
    weight = pipeline.vae.decoder.conv_out.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.fill_(math.nan)
        (picture,) = drawn(engine, ask("other"))
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert picture.problem.startswith("not finite") and all(math.isnan(value) for value in picture.scores.values())
    (again,) = drawn(engine, ask("other", seeds=(1,)))
    assert not again.problem and again.scores["red"] > 0


def test_a_judge_of_pairs_is_refused_when_the_demo_starts(make_engine):
    with pytest.raises(RewardModelError, match="compares pairs"):
        make_engine("base", scorers=[Judge()])


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """`demos/compare.py` up to the moment when it would serve."""
    pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location("compare_demo", Path(__file__).parents[2] / "demos" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from diffalign.demo import ui

    started = []

    def build(demo):
        started.append(demo)
        raise ConfigError("enough")  # outside of what turns mistakes into a line: the command got this far

    monkeypatch.setattr(ui, "build", build)

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["compare.py", "--output", str(tmp_path / "out"), "--device", "cpu", *options])
        started.clear()
        try:
            code = module.main()
        except ConfigError:
            return started[0]
        assert code == 1 and not started
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and "\n" not in error
        return error

    return run


def test_a_mistake_on_the_command_line_is_one_sentence(command, weights, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({}))
    (tmp_path / "model.ckpt").write_bytes(b"x")
    base = ("--base", str(weights["base"]))
    assert "no file or folder /nowhere/run" in command(*base, "--model", "/nowhere/run")
    assert "can run code" in command("--base", str(tmp_path))
    assert "'nothing'" in command(*base, "--score", "nothing")
    assert "limit batch" in command(*base, "--batch", "0")
    assert "neither a file" in command(*base, "--prompts", "nowhere.txt")
    assert "two models are called" in command(*base, "--model", f"base={weights['base']}")


def test_another_base_begins_with_its_own_prompts_settings_and_no_checker_of_shapes(command, weights):
    demo = command("--base", str(weights["base"]))
    assert demo.engine.scorers == [] and (demo.steps, demo.guidance) == (25, 5.0) and len(demo.prompts) == 3
    demo = command("--base", str(weights["base"]), "--score", "shapes", "--steps", "4", "--guidance", "0")
    assert [scorer.name for scorer in demo.engine.scorers] == ["shapes"] and (demo.steps, demo.guidance) == (4, 0.0)

"""Which models are meant, what they were trained on, and how an evaluation of several of them runs and continues."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from peft import LoraConfig
from PIL import Image

from diffalign.data.schema import PreferenceRow, write_preferences
from diffalign.errors import CheckpointError, ConfigError
from diffalign.evaluation import evaluate
from diffalign.evaluation.appearance import clip_embedding, distance, diversity, embed, measure
from diffalign.evaluation.models import ModelSpec, locate, parse_models
from diffalign.evaluation.panel import Panel
from diffalign.evaluation.pictures import SamplingSettings, draw
from diffalign.evaluation.roles import read_training, role
from diffalign.evaluation.scores import judge_pairs
from diffalign.pipelines import adapter_for
from diffalign.pipelines.export import save_lora
from reward_models import load_reward_model
from tests.tiny import tiny_sdxl

ASKED: list[int] = []


def red(images, prompts):
    ASKED.append(len(images))
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def blue(images, prompts):
    return [float(np.asarray(image)[..., 2].mean()) for image in images]


class First:
    """A judge that always prefers the first picture, unless the pictures are equal."""

    name, identity = "first", {"id": "first", "revision": None, "code_version": None}

    def compare(self, pairs, prompts):
        import torch

        return torch.tensor([1.0 if prompt != "unknown" else float("nan") for prompt in prompts])


def save_run(folder: Path, seed: int, **config) -> Path:
    pipeline = tiny_sdxl()
    import torch

    torch.manual_seed(seed)
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    save_lora(adapter_for(pipeline), folder / "final")
    (folder / "training_report.json").write_text(json.dumps({"method": "dpo"}))
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "seed": seed, **config}))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base and two runs, one of which records the score it was trained on."""
    folder = tmp_path_factory.mktemp("models")
    tiny_sdxl().save_pretrained(folder / "base")
    save_run(folder / "first", 1, dataset_score="red")
    save_run(folder / "second", 2)
    return folder


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """Two runs and a negative-guided base at two guidance scales."""
    folder = tmp_path_factory.mktemp("out")
    ASKED.clear()
    return folder, run(place, folder)


def run(place, folder, **changes):
    settings = {
        "model": str(place / "base"),
        "aligned": [place / "first", f"other={place / 'second'}", f"npo={place / 'base'}?negative={place / 'second'}"],
        "prompts": ["a cat", "a dog"],
        "seeds": 2,
        "steps": 1,
        "guidance": [3.0, 1.5],
        "reward_models": [load_reward_model(red), load_reward_model(blue)],
        "device": "cpu",
    }
    return evaluate(output_dir=folder, **settings | changes)


def test_names_paths_and_options_are_read(tmp_path):
    assert parse_models("out/run") == [ModelSpec("out/run", "aligned")]
    a, b, c = parse_models(["out/a/final", "mine=out/b", "n=shapes?negative=out/c&alpha=0.5&beta=1"])
    assert (a.name, b.name, b.path) == ("a", "mine", "out/b")
    assert c == ModelSpec("shapes", "n", "out/c", 0.5, 1.0) and str(c) == "shapes?negative=out/c&alpha=0.5&beta=1.0"
    folder = tmp_path / "lr=1e-4"
    folder.mkdir()
    assert parse_models([folder])[0].path == str(folder)


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        ([], "got none"),
        (["a/x", "b/x"], "'x'"),
        (["base=a"], "the base model"),
        (["a?negtive=b"], "at most once"),
        (["a?alpha=1"], "negative=PATH, which is missing"),
        (["a?negative=b&alpha=x"], "must be a number"),
        (["..=a"], "plain word"),
        (["seed=a"], "a key of pairs.jsonl"),
    ],
)
def test_bad_models_are_refused(texts, word):
    with pytest.raises(ConfigError, match=word):
        parse_models(texts)


def test_places_of_weights(place):
    assert locate(ModelSpec("shapes", "m"), "shapes") == ("base", "shapes")
    assert locate(ModelSpec("owner/name", "m"), "shapes") == ("pipeline", "owner/name")
    assert locate(ModelSpec(str(place / "first")), "shapes")[0] == "lora"
    for spec in (ModelSpec("./nowhere"), ModelSpec(f"{place}/nowhere"), ModelSpec("shapes", negative="/nowhere")):
        with pytest.raises(CheckpointError, match="does not exist"):
            locate(spec, "shapes")
    with pytest.raises(CheckpointError, match="must be downloaded first"):
        locate(ModelSpec("shapes", negative="owner/name"), "shapes")


def test_roles_come_from_the_run_or_its_table(place, tmp_path):
    assert read_training(place / "first").trained_on == ("red",)
    assert read_training(place / "first" / "final").seed == 1
    assert read_training(place / "second").trained_on is None
    png = Path(tmp_path / "p.png")
    Image.new("RGB", (8, 8)).save(png)
    rows = [PreferenceRow("a", [png.read_bytes()] * 2, [1.0, 0.0], [1, 2], scores={"shapes": [1.0, 0.0]})]
    write_preferences(rows, tmp_path / "table")
    save_run(tmp_path / "run", 3, dataset=str(tmp_path / "table"))
    assert read_training(tmp_path / "run").trained_on == ("shapes",)
    voted = [replace(rows[0], scores={"vote": [1.0, 0.0], "shapes": [0.0, 1.0]})]  # a person decided, not the scorer
    write_preferences(voted, tmp_path / "votes")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "dataset": str(tmp_path / "votes")}))
    assert read_training(tmp_path / "run").trained_on == ("vote",)
    assert [role(name, ("shapes",)) for name in ("shapes", "shapes-strict", "clip")] == [
        "trained-on",
        "related",
        "hold-out",
    ]
    assert role("clip", None) == "unknown"
    assert role("hpsv2.1", ("hpsv2",)) == "related"


def test_roles_of_tables_that_the_generator_made(tmp_path):
    """A scorer that did not vote is a hold-out; where the order of the pipelines decided, all are."""
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "score_ranges.json").write_text(json.dumps({"clip": [0, 1], "aesthetic": [0, 9]}))
    made = tmp_path / "table" / "generation_report.json"
    made.write_text(json.dumps({"rank_by": "votes", "hold_outs": ["aesthetic"]}))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"method": "dpo", "dataset": str(tmp_path / "table")}))
    assert read_training(run).trained_on == ("clip",)
    made.write_text(json.dumps({"rank_by": "pipelines", "hold_outs": []}))
    assert read_training(run).trained_on == () and role("clip", ()) == "hold-out"


def test_roles_of_online_runs(tmp_path):
    """The run's report has the judges' own names; until there is one, the settings' names without their options."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"method": "prefgrpo", "rewards": ["unified-reward?family=think&backend=server", "clip"]})
    )
    assert read_training(tmp_path).trained_on == ("unified-reward", "clip")
    (tmp_path / "training_report.json").write_text(json.dumps({"method": "prefgrpo", "rewards": ["hpsv2.1"]}))
    assert read_training(tmp_path).trained_on == ("hpsv2.1",)
    (tmp_path / "training_report.json").unlink()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "prefgrpo", "rewards": ["mine.judges:Judge"]}))
    assert read_training(tmp_path).trained_on is None  # its scores may have any name


def test_a_judge_that_only_compares_is_never_asked_for_scores():
    class Thinking(First):
        pairs_only = True

        def score(self, images, prompts):
            raise AssertionError("asked for scores")

    panel = Panel(["a", "b"], [Thinking()])
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    base, other = panel.judge(pictures), panel.judge(pictures[::-1])
    assert base.scores == {} and panel.pairwise(base, other)["first"] == ([0.5, 0.5], [0.5, 0.5])


def test_several_models_share_one_report_with_roles_and_a_sweep(finished):
    folder, report = finished
    assert report == json.loads((folder / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == ["first", "other", "npo"]
    assert report["scores"] == report["models"][0]["scores"]
    roles = [model["scores"]["red"]["role"] for model in report["models"]]
    assert roles == ["trained-on", "unknown", "unknown"]
    assert report["models"][0]["scores"]["blue"]["role"] == "hold-out" and report["models"][0]["training_seed"] == 1
    for model in report["models"]:
        assert [entry["guidance"] for entry in model["guidance"]] == [3.0, 1.5]
        assert model["guidance"][0]["scores"]["red"]["base"] == report["scores"]["red"]["base"]
        assert model["moved"] > 0 and set(model["appearance"]) >= {"sharpness", "saturation", "diversity"}
        assert 0 <= model["scores"]["red"]["sign_test"]["p"] <= model["scores"]["red"]["sign_test"]["p_holm"] <= 1
    values = {model["scores"]["red"]["aligned"] for model in report["models"]}
    assert len(values) == 3 and report["scores"]["red"]["base"] not in values
    page = (folder / "report.html").read_text()
    headings = re.findall("<h2>([^<]+)</h2>", page)
    assert headings[:6] == ["All scores", "Guidance", "Appearance"] + [
        f"Worst regressions of {n}" for n in ("first", "other", "npo")
    ]
    assert 'class="role trained-on"' in page and "Holm" in page
    assert len(list((folder / "pictures" / "npo" / "guidance-1.5").glob("*.png"))) == 4
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    assert set(records[0]) == {"prompt", "seed", "base", "first", "other", "npo"}


def test_a_stopped_evaluation_continues_with_what_is_equal_only(finished, place):
    folder, report = finished
    files = sorted((folder / "pictures").rglob("*.png"))
    before = {file: file.stat().st_mtime_ns for file in files}
    gone, broken = files[0], files[-1]
    gone.unlink()
    broken.write_bytes(broken.read_bytes()[:200])
    ASKED.clear()
    again = run(place, folder)
    assert again["models"] == report["models"]
    changed = {file for file in files if file.stat().st_mtime_ns != before[file]}
    assert changed == {gone, broken}
    assert sum(ASKED) == 0  # the two are drawn as they were, so their scores are known
    run(place, folder, seeds=1, steps=2, guidance=3.0, aligned=[place / "first"])
    assert sum(ASKED) == 4  # 2 prompts x (base and model): other settings, other pictures


def test_other_weights_in_the_same_place_are_drawn_again(tmp_path):
    pipeline = tiny_sdxl()
    settings = SamplingSettings(steps=1, guidance=1.0)
    (file,) = draw(pipeline, ["a"], [0], settings, tmp_path, identity="one")
    first = file.stat().st_mtime_ns, file.read_bytes()
    draw(pipeline, ["a"], [0], settings, tmp_path, identity="one")
    assert file.stat().st_mtime_ns == first[0]
    for identity, changes in (("two", settings), ("one", SamplingSettings(steps=2, guidance=1.0)), (None, settings)):
        draw(pipeline, ["a"], [0], changes, tmp_path, identity=identity)
        assert file.stat().st_mtime_ns != first[0]
        first = file.stat().st_mtime_ns, b""


def test_a_judge_that_always_says_first_prefers_nobody_and_a_failure_is_missing():
    pictures = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    wins = judge_pairs(First(), pictures, pictures[::-1], ["a", "unknown"])
    assert wins[0] == 0.5 and wins[1] != wins[1]


def test_appearance_by_hand():
    gray, red_picture = Image.new("RGB", (8, 8), (128, 128, 128)), Image.new("RGB", (8, 8), (255, 0, 0))
    plain = measure(gray)
    assert (plain["sharpness"], plain["saturation"], plain["contrast"]) == pytest.approx((0, 0, 0), abs=1e-9)
    assert plain["brightness"] == pytest.approx(128 / 255) and measure(red_picture)["saturation"] == 1
    stripes = Image.fromarray(np.tile(np.uint8([[[0] * 3], [[255] * 3]]), (4, 8, 1)))
    assert measure(stripes)["sharpness"] > 0.5 and measure(stripes)["contrast"] == pytest.approx(0.5)
    vectors = embed([gray, gray, gray, red_picture], None)
    assert distance(vectors[:1], vectors[1:2], cosine=False) == 0
    apart = float(np.sqrt(((127 / 255) ** 2 + 2 * (128 / 255) ** 2) / 3))
    assert diversity(vectors, 2, cosine=False) == pytest.approx([0, apart])
    assert np.isnan(diversity(vectors, 1, cosine=False)).all()
    by_color = embed([gray, red_picture], lambda images: [np.asarray(image)[0, 0] for image in images])
    assert distance(by_color[:1], by_color[1:], cosine=True) == pytest.approx(1 - 1 / np.sqrt(3))
    with pytest.raises(ConfigError, match="shape"):
        embed([gray], lambda images: [1.0])


def test_clip_embeds_pictures_by_its_image_tower(tmp_path):
    import open_clip
    import torch

    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip-embed.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.save(open_clip.create_model("tiny-clip-embed").state_dict(), tmp_path / "w.pt")
    embedding = clip_embedding(load_reward_model("clip", model="tiny-clip-embed", tag=str(tmp_path / "w.pt")))
    pictures = [Image.linear_gradient("L").convert("RGB"), Image.new("RGB", (40, 30), "red")]
    vectors = embed([*pictures, pictures[0]], embedding)
    assert vectors.shape == (3, 16) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert distance(vectors[:1], vectors[2:], cosine=True) == pytest.approx(0, abs=1e-6)
    assert distance(vectors[:1], vectors[1:2], cosine=True) > 1e-4

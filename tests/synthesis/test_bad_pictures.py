"""Pictures that cannot be drawn and scores that are none cost the rows that they belong to, and are told."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline

from diffalign.data import load_preferences
from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.run import generate
from tests.synthesis.conftest import JUDGES


def test_a_pipeline_that_fails_on_some_prompts_costs_those_alone(clean, settings, monkeypatch):
    original = StableDiffusionPipeline.encode_prompt

    def picky(self, prompt=None, *arguments, **options):
        if prompt is not None and any("dog" in text for text in prompt):
            raise ValueError("I draw no dogs")
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", picky)
    config = settings("picky")
    report = generate(config)
    assert [row.prompt for row in load_preferences(config.output_dir)] == ["a cat", "a bird", "a red fish"]
    assert report["set_aside"] == {"0 usable pictures of 3": 2}
    assert report["problems"] == {"one: drawing failed": 4, "two: drawing failed": 2}
    aside = [
        row for file in sorted(Path(config.output_dir).glob("set_aside/*")) for row in pq.read_table(file).to_pylist()
    ]
    assert {row["prompt"] for row in aside} == {"a dog", "two dogs"}
    assert aside[0]["problems"] == ["drawing failed: I draw no dogs"] * 3
    by_prompt = {row["prompt"]: row for row in datasets.load_dataset(clean[0].output_dir, split="train")}
    for row in datasets.load_dataset(config.output_dir, split="train"):
        for ours, theirs in zip(row["images"], by_prompt[row["prompt"]]["images"], strict=True):
            assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)).max() <= 1


def test_a_bad_prompt_alone_in_its_shard_does_not_stop_the_run(settings, monkeypatch):
    original = StableDiffusionPipeline.encode_prompt

    def picky(self, prompt=None, *arguments, **options):
        if prompt is not None and any("fish" in text for text in prompt):
            raise ValueError("I draw no fish")
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", picky)
    report = generate(settings("lonely"))  # the last shard holds the fish alone
    assert (report["rows"], report["problems"]) == (4, {"one: drawing failed": 2, "two: drawing failed": 1})


def test_a_pipeline_that_breaks_on_the_way_spoils_no_picture(settings, painters, monkeypatch):
    """What a dead device could not draw is drawn by the next start, not recorded as failed for good."""
    original, state = StableDiffusionPipeline.encode_prompt, {"dead": False}

    def dying(self, prompt=None, *arguments, **options):
        state["dead"] |= any("dog" in text for text in prompt or [])
        if state["dead"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return original(self, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", dying)
    spec = {"steps": 1, "guidance": 2.0, "images": 2, "batch_size": 2}
    config = settings("dying", pipelines=[{"name": n, "model": m, **spec} for n, m in zip("ab", painters, strict=True)])
    with pytest.raises(DataError, match="illegal memory access.*run again"):
        generate(config)
    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", original)
    report = generate(config)
    assert (report["rows"], report["problems"]) == (5, {})


def test_a_pipeline_that_fails_on_everything_stops_the_run(settings, monkeypatch):
    def broken(*arguments, **options):
        raise ValueError("out of order")

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", broken)
    with pytest.raises(DataError, match="pipeline one draws nothing any more.*out of order"):
        generate(settings())


def test_missing_scores_follow_the_rule_and_nothing_is_lost(settings):
    models = [{"name": "red", "model": JUDGES + "red"}, {"name": "blind", "model": JUDGES + "blind_to_dogs"}]
    config = settings("rows", reward_models=models, missing="skip_row")
    report = generate(config)
    assert report["set_aside"] == {"missing scores of blind (rule skip_row)": 2}
    assert report["reward_models"]["blind"]["missing"] == 6
    kept = generate(settings("models", reward_models=models))
    assert kept["rows"] == 5
    aside = datasets.load_dataset("parquet", data_files=f"{config.output_dir}/set_aside/*.parquet", split="train")
    assert len(aside[0]["images"]) == 3 and aside[0]["reason"].startswith("missing")


def test_a_scorer_that_never_answers_is_said_so(settings):
    config = settings(reward_models=[{"name": "blind", "model": JUDGES + "blind"}])
    with pytest.raises(DataError, match="no prompt could be ranked.*kept in set_aside"):
        generate(config)
    assert len(list(Path(config.output_dir).glob("set_aside/*.parquet"))) == 3


def test_repeated_and_even_pictures_are_marked_not_ranked(settings, painters):
    spec = {"model": painters[0], "steps": 1, "guidance": 2.0}
    config = settings(pipelines=[{"name": "a", **spec, "images": 3}], duplicate_distance=255.0)
    with pytest.raises(DataError, match="5 1 usable pictures of 3"):
        generate(config)
    (first, *_) = pq.read_table(Path(config.output_dir) / "set_aside" / "00000.parquet").to_pylist()
    assert first["problems"] == ["", "duplicate of candidate 0", "duplicate of candidate 0"]


@pytest.mark.parametrize(("judge", "word"), [("Miscounting", "expected 3 numbers.*got 2"), ("Sure", "from 0 to 1")])
def test_a_scorer_that_answers_nonsense_invents_no_scores(settings, judge, word):
    spec = {"name": "odd", "model": JUDGES + judge}
    with pytest.raises(DataError, match=rf"odd: .*{word}"):
        generate(settings(reward_models=[spec], prompts_per_shard=1))


def test_a_reward_model_that_cannot_be_loaded_is_found_before_anything_is_drawn(settings, monkeypatch):
    monkeypatch.setattr("diffalign.synthesis.run.Artist", None)  # would be called
    with pytest.raises(ConfigError, match="mps: its weights are published only as a pickled module"):
        generate(settings(reward_models=["mps"], load_models="one_by_one"))

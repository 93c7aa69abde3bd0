"""A preference table from a pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import load_dataset

from diffalign.errors import ConfigError, DataError
from diffalign.synthesis import build_preferences
from reward_models import load_reward_model
from tests.tiny import tiny_sd

PROMPTS = ["a cat", "a dog", "a bird"]
SETTINGS = {"steps": 2, "guidance": 2.0}


def mean_red(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def blind_to_dogs(images, prompts):
    return [
        None if prompt == "a dog" else float(np.asarray(i).std()) for i, prompt in zip(images, prompts, strict=True)
    ]


@pytest.fixture(scope="module")
def pipeline():
    return tiny_sd()


@pytest.fixture(scope="module")
def table(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("table") / "prefs"
    scorers = [load_reward_model(mean_red), load_reward_model(blind_to_dogs)]
    drawn = []
    report = build_preferences(
        pipeline,
        PROMPTS,
        images_per_prompt=3,
        reward_models=scorers,
        folder=folder,
        seed=5,
        prompts_at_once=2,
        on_progress=drawn.append,
        **SETTINGS,
    )
    return report, drawn, load_dataset(str(folder), split="train")


def test_the_table_loads_in_datasets_with_everything_in_it(table):
    report, drawn, rows = table
    assert (report.rows, report.images, sum(drawn)) == (3, 9, 9)
    assert rows["prompt"][:] == PROMPTS
    for row in rows:
        assert [image.size for image in row["images"]] == [(32, 32)] * 3
        scores = {entry["name"]: entry["values"] for entry in row["scores"]}
        assert scores["mean_red"] == pytest.approx(mean_red(row["images"], []), abs=1e-3)
        assert (scores["blind_to_dogs"] == [None] * 3) == (row["prompt"] == "a dog")
        best = int(np.argmax(row["preference"]))
        assert row["rank"][best] == 1
        assert len({source["seed"] for source in row["sources"]}) == 3


def test_a_stored_seed_draws_the_stored_picture_again(table, pipeline):
    import torch

    row = table[2][1]
    source, image = row["sources"][2], row["images"][2]
    generator = torch.Generator("cpu").manual_seed(source["seed"])
    again = pipeline(
        row["prompt"], generator=generator, num_inference_steps=source["steps"], guidance_scale=source["guidance"]
    ).images[0]
    assert np.abs(np.asarray(again, dtype=int) - np.asarray(image, dtype=int)).max() <= 1


def test_rows_do_not_depend_on_the_other_prompts_or_their_grouping(table, pipeline, tmp_path):
    build_preferences(
        pipeline,
        PROMPTS[1:2],
        images_per_prompt=3,
        reward_models=[load_reward_model(mean_red)],
        folder=tmp_path / "one",
        seed=5,
        **SETTINGS,
    )
    alone = load_dataset(str(tmp_path / "one"), split="train")[0]
    for first, second in zip(alone["images"], table[2][1]["images"], strict=True):
        assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1


def test_a_prompt_nobody_could_judge_is_set_aside_with_the_reason(pipeline, tmp_path):
    report = build_preferences(
        pipeline,
        PROMPTS,
        images_per_prompt=2,
        reward_models=[load_reward_model(blind_to_dogs)],
        folder=tmp_path / "t",
        **SETTINGS,
    )
    assert report.rows == 2
    assert list(report.set_aside) == ["a dog"] and "missing" in report.set_aside["a dog"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"images_per_prompt": 1}, "two images"),
        ({"reward_models": []}, "reward models"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["a", "b", "a"]}, "'a' again"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(changes, word, tmp_path):
    arguments = {"prompts": PROMPTS, "images_per_prompt": 2, "reward_models": [load_reward_model(mean_red)]} | changes
    prompts = arguments.pop("prompts")
    with pytest.raises(ConfigError, match=word):
        build_preferences(None, prompts, folder=tmp_path / "t", **arguments)
    assert not (tmp_path / "t").exists()


def test_an_existing_table_is_not_overwritten(table, pipeline):
    with pytest.raises(DataError, match="already holds"):
        build_preferences(
            pipeline,
            PROMPTS,
            images_per_prompt=2,
            reward_models=[load_reward_model(mean_red)],
            folder=table[0].folder,
            **SETTINGS,
        )

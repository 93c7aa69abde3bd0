"""Finding, loading and running reward models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image

from diffalign.shapes.scorer import ShapesScorer
from reward_models import BaseRewardModel, RewardModel, RewardModelError, can_score, load_reward_model, registry

PICTURES = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in range(40)]


class Redness(BaseRewardModel):
    """A scorer of a user's own."""

    name = "redness"
    batch_size = 7

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.batches = scale, []

    @property
    def identity(self):
        return {"id": "redness", "revision": None, "code_version": "1"}

    def score_batch(self, images, prompts):
        self.batches.append(len(images))
        return [
            None if prompt == "?" else self.scale * image.getpixel((0, 0))[0]
            for image, prompt in zip(images, prompts, strict=True)
        ]


class Placed(Redness):
    def __init__(self, device: str = "cpu") -> None:
        self.device = device


def brightness(images, prompts):
    return [sum(image.getpixel((0, 0))) for image in images]


def test_batches_never_change_a_score_and_missing_is_nan():
    model = Redness()
    prompts = ["p"] * 39 + ["?"]
    scores = model.score(PICTURES, prompts)
    assert model.batches == [7, 7, 7, 7, 7, 5]
    assert (scores.dtype, scores.shape, scores.device.type) == (torch.float32, (40,), "cpu")
    assert scores[:39].tolist() == list(range(39))
    assert scores[39].isnan()
    assert model.score([], []).shape == (0,)


def test_a_class_a_path_a_function_and_a_ready_model_all_load(monkeypatch):
    monkeypatch.setitem(sys.modules, "users_scorers", sys.modules[__name__])
    assert load_reward_model("users_scorers:Redness", scale=2.0).score(PICTURES[:3], ["p"] * 3).tolist() == [0, 2, 4]
    assert load_reward_model(Redness, scale=3.0).scale == 3.0
    function = load_reward_model("users_scorers:brightness")
    assert function.name == "brightness"
    assert function.identity["id"].endswith(":brightness")
    assert function.score(PICTURES[5:6], ["p"]).tolist() == [5]
    ready = Redness()
    assert load_reward_model(ready) is ready
    assert isinstance(ready, RewardModel)


def test_the_shapes_scorer_loads_by_path_and_takes_a_device_it_does_not_need():
    assert isinstance(load_reward_model("diffalign.shapes.scorer:ShapesScorer", device="cuda"), ShapesScorer)


def test_an_unknown_name_names_the_nearest_and_all():
    with pytest.raises(RewardModelError, match=r"Did you mean 'clip'\?.*Available: .*clip"):
        load_reward_model("clipp")


def test_entry_points_are_offered(monkeypatch):
    class Entry:
        name, value = "redness", "users_scorers:Redness"

    monkeypatch.setitem(sys.modules, "users_scorers", sys.modules[__name__])
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()] if group == "reward_models" else [])
    assert isinstance(load_reward_model("redness"), Redness)


@pytest.mark.parametrize(
    ("target", "options", "word"),
    [
        (Redness, {"skale": 1.0}, "skale.*scale"),
        (Redness, {"dtype": torch.float16}, "dtype"),
        (brightness, {"scale": 1}, "none"),
        ("no_such_module:Model", {}, "no_such_module"),
        ("reward_models:Nothing", {}, "Nothing"),
        (dict, {}, "no reward model"),
    ],
)
def test_what_cannot_be_used_is_refused(target, options, word):
    with pytest.raises(RewardModelError, match=word):
        load_reward_model(target, **options)


def test_options_may_be_written_behind_a_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "users_scorers", sys.modules[__name__])
    assert load_reward_model("users_scorers:Redness?scale=2.5").scale == 2.5
    assert load_reward_model("users_scorers:Redness?scale=2.5", scale=3.0).scale == 3.0
    assert load_reward_model("users_scorers:Redness?scale=1e-3").scale == 1e-3
    assert load_reward_model("users_scorers:Placed?device=cuda:1", device="cpu").device == "cuda:1"
    assert load_reward_model("users_scorers:Placed", device="cpu").device == "cpu"
    assert registry.split_options("clip?dtype=fp16&tag=null") == ("clip", {"dtype": torch.float16, "tag": None})


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("clip?nonsense", "option=value"),
        ("clip?dtype=half", "fp32"),
        ("clip?tag=[", "YAML"),
        ("clip?colour=red", "colour.*model"),
        ("unified-reward?backend=server&api_key=secret", "REWARD_MODEL_API_KEY"),
        ("ensemble", "needs the option members"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(text, word):
    with pytest.raises(RewardModelError, match=word) as refused:
        load_reward_model(text)
    assert "secret" not in str(refused.value)


class OnlyPairs(Redness):
    """As UnifiedReward's thinking judges: ``score`` is there, and refuses."""

    pairs_only = True

    def compare(self, pairs, prompts): ...


def test_who_can_score():
    assert can_score(Redness()) and not can_score(OnlyPairs())


def test_wrong_counts_and_infinite_scores_are_refused():
    with pytest.raises(RewardModelError, match="2 and 1"):
        Redness().score(PICTURES[:2], ["p"])
    with pytest.raises(RewardModelError, match="one string"):
        Redness().score(PICTURES[:1], "p")
    with pytest.raises(RewardModelError, match="infinite"):
        load_reward_model(lambda images, prompts: [float("inf")]).score(PICTURES[:1], ["p"])
    with pytest.raises(RewardModelError, match="expected 2 scores"):
        load_reward_model(lambda images, prompts: [1.0]).score(PICTURES[:2], ["p", "q"])


def test_the_package_needs_nothing_of_diffalign():
    code = (
        "import sys, reward_models, reward_models.clip\n"
        "sys.exit(any(name.split('.')[0] == 'diffalign' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

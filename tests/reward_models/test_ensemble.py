"""Ensembles: votes, z-scores and means by hand, groups, missing scores, members' raw scores."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from PIL import Image

from diffalign.synthesis import rank_candidates
from reward_models import RewardModelError, load_reward_model
from reward_models.ensemble import Ensemble, combine

NAN = math.nan
RAW = {"a": torch.tensor([0.1, 0.9, 0.5, 0.3]), "b": torch.tensor([30.0, 30.0, 10.0, 20.0])}
ONE = ["p"] * 4


def brightness(images, prompts):
    return [float(image.getpixel((0, 0))[0]) for image in images]


def darkness(images, prompts):
    return [NAN if image.width > 9 else -float(image.getpixel((0, 0))[0]) / 1000 for image in images]


def greys(*levels, size=8):
    return [Image.new("RGB", (size, size), (level,) * 3) for level in levels]


def values(tensor):
    return pytest.approx(tensor.tolist(), abs=1e-6, nan_ok=True)


# --- the rules ---------------------------------------------------------------------------------------------------


def test_votes_are_shares_of_wins_as_in_the_generator():
    assert values(6 * combine(RAW, ONE)) == [0 + 2, 3 + 2, 2 + 0, 1 + 1]
    ranking = rank_candidates({name: scores.tolist() for name, scores in RAW.items()})
    assert ranking.preference == values(combine(RAW, ONE))
    weighted = combine(RAW, ONE, weights={"b": 3.0})
    assert values(weighted) == [(0 + 6) / 12, (3 + 6) / 12, 2 / 12, (1 + 3) / 12]


def test_z_scores_by_hand_and_whatever_the_scale():
    raw = {"a": torch.tensor([0.0, 1.0, 2.0, 3.0]), "b": torch.tensor([0.0, 100.0, 0.0, 0.0])}
    one, other = math.sqrt(1.25), math.sqrt(1875.0)
    expected = [((i - 1.5) / one + (100 * (i == 1) - 25) / other) / 2 for i in range(4)]
    assert expected == values(combine(raw, ONE, rule="zscore"))
    scaled = combine(raw | {"b": 10 * raw["b"]}, ONE, rule="zscore")
    assert expected == values(scaled)
    tied = combine({"a": torch.full((4,), 3.3), "b": raw["a"]}, ONE, rule="zscore")
    assert [(i - 1.5) / one / 2 for i in range(4)] == values(tied)  # who ties all adds exactly nothing


def test_means_by_hand():
    assert values(combine(RAW, ONE, rule="mean")) == [15.05, 15.45, 5.25, 10.15]
    assert values(combine(RAW, ONE, rule="mean", weights={"a": 3.0})) == [7.575, 8.175, 2.875, 5.225]


@pytest.mark.parametrize("rule", ["votes", "zscore"])
def test_only_pictures_of_one_prompt_are_compared(rule):
    mixed = combine({"a": torch.tensor([1.0, 50.0, 2.0, 40.0, 7.0])}, ["p", "q", "p", "q", "alone"], rule=rule)
    assert mixed[1] > mixed[3] and mixed[2] > mixed[0]
    assert mixed[0] == mixed[3] and mixed[1] == mixed[2]  # each is best or worst of its own two
    assert mixed[4].isnan()  # nothing to be compared with


# --- missing scores ----------------------------------------------------------------------------------------------


def test_missing_scores_follow_the_named_rule():
    raw = {"a": torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0]), "b": torch.tensor([9.0, NAN, 1.0, 5.0, 4.0])}
    prompts = ["p", "p", "p", "q", "q"]
    assert values(combine(raw, prompts)) == [0.0, 0.5, 1.0, 0.5, 0.5]
    assert values(combine(raw, prompts, missing="skip_row")) == [NAN, NAN, NAN, 0.5, 0.5]
    assert values(combine(raw, prompts, missing="skip_picture")) == [0.5, NAN, 0.5, 0.5, 0.5]
    assert values(combine(raw, prompts, rule="mean")) == [1.0, 2.0, 3.0, 3.0, 3.0]
    nothing = {name: torch.full((5,), NAN) for name in raw}
    for missing in ("skip_model", "skip_row", "skip_picture"):
        assert combine(nothing, prompts, missing=missing).isnan().all()


# --- the reward model --------------------------------------------------------------------------------------------


def test_members_raw_scores_are_kept_and_reachable():
    ensemble = load_reward_model("ensemble", members=[brightness, darkness], rule="votes")
    pictures, prompts = greys(10, 200, 90), ["p"] * 3
    raw = ensemble.score_members(pictures, prompts)
    assert raw["brightness"].tolist() == [10, 200, 90]
    assert values(raw["darkness"]) == [-0.01, -0.2, -0.09]
    assert ensemble.score(pictures, prompts).tolist() == [0.5, 0.5, 0.5]
    wide = greys(10, 200, 90, size=10)  # the second member gives up on these
    assert ensemble.score(wide, prompts).tolist() == [0, 1, 0.5]
    assert ensemble.score(wide, ["p", "q", "r"]).isnan().all()


def test_its_identity_is_that_of_its_members_and_rules():
    identities = {
        json_like["revision"]
        for json_like in (
            Ensemble([brightness, darkness]).identity,
            Ensemble([brightness, darkness], weights={"darkness": 2.0}).identity,
            Ensemble([brightness, darkness], "zscore").identity,
            Ensemble([brightness, "shapes"]).identity,
        )
    }
    assert len(identities) == 4
    assert Ensemble([brightness, darkness]).identity == Ensemble([brightness, darkness]).identity


def test_a_generator_that_cuts_its_calls_does_not_cut_a_group():
    assert Ensemble([brightness]).batch_size == sys.maxsize


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"members": []}, "one member or more"),
        ({"members": "shapes"}, "put it in a list"),
        ({"members": ["shapes", "shapes"]}, "two members are named shapes"),
        ({"members": ["shapes"], "rule": "median"}, "votes, zscore or mean"),
        ({"members": ["shapes"], "missing": "zero"}, "skip_model"),
        ({"members": ["shapes"], "weights": {"clip": 1.0}}, "the members are shapes"),
        ({"members": ["shapes"], "weights": {"shapes": -1.0}}, "positive number"),
        ({"members": [{"name": "shapes"}]}, "key 'model'"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(RewardModelError, match=words):
        load_reward_model("ensemble", **options)

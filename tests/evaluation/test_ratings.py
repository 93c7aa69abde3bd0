"""Ratings from votes: known strengths come back, intervals hold them, and few votes promise little."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.errors import DataError
from diffalign.evaluation.ratings import ELO_POINTS, Game, duels, rate_models, win_rate

STRENGTH = {"a": 0.9, "b": 0.1, "c": -1.0}


def simulate(count: int, seed: int, *, per_prompt: int = 1, ties: float = 0.0) -> list[Game]:
    """Votes drawn from the model; those of one prompt have one outcome when ``per_prompt`` > 1."""
    rng = np.random.default_rng(seed)
    names, games = list(STRENGTH), []
    for prompt in range(count // per_prompt):
        first, second = rng.permutation(3)[:2]
        chance = 1 / (1 + math.exp(STRENGTH[names[second]] - STRENGTH[names[first]]))
        outcome = 0.5 if rng.random() < ties else float(rng.random() < chance)
        games += [Game(names[first], names[second], outcome, prompt)] * per_prompt
    return games


def test_known_strengths_come_back_in_elo_points():
    ratings = {r.name: r for r in rate_models(simulate(20_000, 0))}
    for name, strength in STRENGTH.items():
        assert ratings[name].elo.mean == pytest.approx(1000 + ELO_POINTS * strength, abs=10)
        assert ratings[name].elo.high - ratings[name].elo.low < 25
    assert [r.name for r in rate_models(simulate(20_000, 0))] == ["a", "b", "c"]


@pytest.mark.parametrize("per_prompt", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(per_prompt):
    held = []
    for seed in range(300):
        for rating in rate_models(simulate(240, seed, per_prompt=per_prompt)):
            held.append(rating.elo.low <= 1000 + ELO_POINTS * STRENGTH[rating.name] <= rating.elo.high)
    assert 0.93 <= np.mean(held) <= 0.98


def test_the_order_of_votes_and_the_side_of_a_model_do_not_matter():
    games = simulate(200, 1)
    turned = [Game(g.second, g.first, 1 - g.outcome, g.cluster) for g in reversed(games)]
    for one, other in zip(rate_models(games), rate_models(turned), strict=True):
        assert (one.name, one.games) == (other.name, other.games)
        assert one.elo.mean == pytest.approx(other.elo.mean)


def test_two_models_by_hand():
    """Symmetric Newton solution: with w wins of n and one prior tie each, sigma(2s) n + sigma(s) = w + 1/2."""
    best, worst = rate_models([Game("a", "b", 1.0, i) for i in range(3)] + [Game("a", "b", 0.0, 9)])
    s = (best.elo.mean - 1000) / ELO_POINTS
    assert 4 / (1 + math.exp(-2 * s)) + 1 / (1 + math.exp(-s)) == pytest.approx(3.5)
    assert worst.elo.mean == pytest.approx(2000 - best.elo.mean)
    assert (best.wins, best.ties, best.losses) == (3, 0, 1)


def test_few_votes_that_agree_still_leave_room():
    best, worst = rate_models([Game("a", "b", 1.0, i) for i in range(3)])
    assert math.isfinite(best.elo.mean) and best.elo.low < worst.elo.high


def test_a_model_whose_votes_cancel_out_has_an_interval():
    games = [Game("a", "b", 1.0, "p"), Game("b", "c", 1.0, "p"), Game("a", "c", 1.0, "p"), Game("a", "c", 1.0, "q")]
    for rating in rate_models(games):
        assert rating.elo.low < rating.elo.mean < rating.elo.high


def test_models_that_never_met_have_no_common_scale():
    ratings = {r.name: r for r in rate_models([Game("a", "b", 1.0, 0), Game("b", "c", 0.5, 1), Game("x", "y", 1.0, 2)])}
    assert math.isfinite(ratings["c"].elo.mean)
    assert math.isnan(ratings["x"].elo.mean) and math.isnan(ratings["y"].elo.low)
    most = rate_models([Game("a", "b", 1.0, 0), *(Game("x", "y", 1.0, i) for i in range(3))])
    assert [r.name for r in most[:2]] == ["x", "y"]  # the scale is where most votes are
    assert [r.name for r in rate_models([Game("a", "b", 1.0, 0)])] == ["a", "b"] and rate_models([]) == []


def test_duels_count_each_pair_once():
    games = [Game("b", "a", 1.0, "p"), Game("a", "b", 0.5, "q"), Game("a", "c", 1.0, "q")]
    first, second = duels(games)
    assert (first.first, first.second, first.wins, first.ties, first.losses) == ("a", "b", 0, 1, 1)
    assert first.rate.mean == 0.25 and second.rate.mean == 1.0


def test_wilson_values_and_clusters():
    rate = win_rate([1.0] * 5, range(5))
    assert rate.mean == 1.0 and rate.low == pytest.approx(0.5655, abs=1e-3) and rate.high == pytest.approx(1.0)
    assert win_rate([1.0] * 20, [0, 1, 2, 3, 4] * 4) == rate  # twenty votes on five prompts say no more than five
    assert math.isnan(win_rate([], []).mean)


def test_impossible_votes_are_refused():
    for game in (Game("a", "a", 1.0), Game("a", "b", 2.0), Game("a", "b", math.nan)):
        with pytest.raises(DataError):
            rate_models([game])

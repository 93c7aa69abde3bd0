"""Win rates: closed forms, position bias, and what is asked of the judge."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.trainers.grpo.win_rate import ask_scores, sparse_pairs, swiss_round, win_rates

NAN = float("nan")


class Oracle:
    """Judges by strengths; keeps what it was asked."""

    def __init__(self, strengths):
        self.strengths, self.asked = strengths, []

    def __call__(self, pairs):
        self.asked += pairs
        gap = [self.strengths[i] - self.strengths[j] for i, j in pairs]
        return torch.tensor([0.5 + 0.5 * np.sign(value) for value in gap])


def test_a_total_order_spreads_evenly():
    oracle = Oracle([3, 0, 7, 1, 6, 2, 5, 4])
    out = win_rates(oracle, 8)
    assert out.win_rate.tolist() == pytest.approx([i / 7 for i in oracle.strengths])
    assert len(oracle.asked) == 56
    assert out.stats == {"calls": 56, "pairs": 28, "missing": 0, "ties": 0, "disagreement": 0, "first_wins": 0.5}
    assert not any(i == j for i, j in oracle.asked)


@pytest.mark.parametrize(("size", "pairs"), [(8, 28), (9, 36), (24, 276)])
def test_number_of_calls(size, pairs):
    oracle = Oracle(range(size))
    assert win_rates(oracle, size, both_orders=False).stats["calls"] == pairs
    assert win_rates(oracle, size).stats["calls"] == 2 * pairs


@pytest.mark.parametrize("schedule", ["round_robin", "opponents", "tournament"])
@pytest.mark.parametrize("both_orders", [True, False])
def test_the_mean_is_one_half_whatever_is_said(schedule, both_orders):
    rng = torch.Generator().manual_seed(3)
    for number in range(5):
        out = win_rates(
            lambda pairs: torch.randint(0, 3, (len(pairs),), generator=rng) / 2,
            8,
            number,
            schedule=schedule,
            opponents=3,
            both_orders=both_orders,
        )
        assert out.win_rate.mean().item() == pytest.approx(0.5, abs=1e-12)


def test_ties_and_cycles_are_one_half():
    assert win_rates(Oracle([1, 1, 1, 1]), 4).win_rate.tolist() == [0.5] * 4
    beats = {(0, 1), (1, 2), (2, 0)}
    cycle = win_rates(lambda pairs: torch.tensor([float(pair in beats) for pair in pairs]), 3)
    assert cycle.win_rate.tolist() == [0.5] * 3


def test_relabelling_permutes_and_nothing_else():
    strengths = [0.3, 0.9, 0.1, 0.5]
    rates = win_rates(Oracle(strengths), 4).win_rate
    for order in itertools.permutations(range(4)):
        assert torch.equal(win_rates(Oracle([strengths[i] for i in order]), 4).win_rate, rates[list(order)])


@pytest.mark.parametrize("answer", [0.0, 1.0])
def test_a_judge_that_sees_only_positions_says_nothing(answer):
    out = win_rates(lambda pairs: torch.full((len(pairs),), answer), 8)
    assert out.win_rate.tolist() == [0.5] * 8
    assert (out.stats["disagreement"], out.stats["first_wins"]) == (1.0, answer)
    once = win_rates(lambda pairs: torch.full((len(pairs),), answer), 8, "key", both_orders=False).win_rate
    assert sorted(once.tolist()) != [i / 7 for i in range(8)]  # random order: noise, not a perfect false ranking


def test_the_two_orders_sum_to_one():
    rng = torch.Generator().manual_seed(0)
    out = win_rates(lambda pairs: torch.rand(len(pairs), generator=rng), 2)
    assert out.win_rate.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_missing_judgements_are_left_out():
    def ask(pairs):
        return torch.tensor([NAN if 0 in pair else float(pair[0] > pair[1]) for pair in pairs])

    out = win_rates(ask, 4)
    assert torch.isnan(out.win_rate[0])
    assert out.win_rate[1:].tolist() == [0.0, 0.5, 1.0]
    assert out.stats["missing"] == 0.5
    nothing = win_rates(lambda pairs: torch.full((len(pairs),), NAN), 4)
    assert bool(torch.isnan(nothing.win_rate).all())
    assert nothing.stats["missing"] == 1.0
    # one order alone would be the position's opinion
    half = win_rates(lambda pairs: torch.tensor([1.0 if i < j else NAN for i, j in pairs]), 3)
    assert bool(torch.isnan(half.win_rate).all())


@pytest.mark.parametrize(("size", "opponents"), [(8, 2), (8, 3), (9, 4), (24, 5), (2, 1), (4, 3)])
def test_everyone_meets_as_many_opponents(size, opponents):
    pairs = sparse_pairs(size, opponents, "a")
    met = [sum(i in pair for pair in pairs) for i in range(size)]
    assert met == [opponents] * size
    assert len(set(pairs)) == len(pairs) == size * opponents // 2
    assert all(i < j for i, j in pairs)
    assert pairs == sparse_pairs(size, opponents, "a")
    with pytest.raises(ConfigError, match="impossible"):
        sparse_pairs(5, 3)


@pytest.mark.parametrize(("size", "pairs"), [(8, 12), (16, 32), (24, 60), (9, 16)])
def test_a_tournament_finds_best_and_worst_with_fewer_calls(size, pairs):
    for number in range(5):
        strengths = np.random.default_rng(number).permutation(size)
        out = win_rates(Oracle(strengths), size, number, schedule="tournament")
        assert out.stats["pairs"] == pairs
        rates = out.win_rate.numpy()
        assert rates[strengths.argmax()] == 1.0
        assert np.corrcoef(rates, strengths)[0, 1] > 0.7


def test_nobody_meets_twice_while_others_wait():
    met = {(0, 1), (2, 3)}
    pairs = swiss_round([1.0, 0.0, 1.0, 0.0], met, 0)
    assert not met & set(pairs)
    assert len(swiss_round([0.0] * 5, set(), 0)) == 2


def test_in_a_tournament_those_with_like_points_meet():
    for number in range(20):
        assert set(swiss_round([2.0, 0.0, 2.0, 0.0, 1.0, 1.0], set(), number)) == {(0, 2), (1, 3), (4, 5)}


def test_scores_as_a_judge():
    ask = ask_scores(torch.tensor([10.0, 100.0, 200.0, NAN]))
    assert ask([(0, 2), (2, 0), (1, 1)]).tolist() == [0.0, 1.0, 0.5]
    assert bool(torch.isnan(ask([(0, 3), (3, 0)])).all())
    lenient = ask_scores(torch.tensor([10.0, 100.0, 200.0]), tie_margin=95.0)
    assert lenient([(0, 1), (0, 2)]).tolist() == [0.5, 0.0]
    assert win_rates(lenient, 3).win_rate.tolist() == [0.25, 0.25, 1.0]


def test_unknown_schedule():
    with pytest.raises(ConfigError, match="round_robin"):
        win_rates(Oracle([0, 1]), 2, schedule="swiss")


def test_one_order_ranks_as_both_do():
    """The answer about a pair that was turned around is turned back."""
    strengths = [3, 0, 7, 1, 6, 2, 5, 4]
    oracle = Oracle(strengths)
    assert win_rates(oracle, 8, "key", both_orders=False).win_rate.tolist() == pytest.approx([i / 7 for i in strengths])
    assert any(i > j for i, j in oracle.asked) and any(i < j for i, j in oracle.asked)

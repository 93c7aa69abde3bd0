"""Votes of several reward models (RankDPO, Algorithm 1)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.ranking import Voter, rank_by_given, rank_by_sum, rank_candidates

NAN = math.nan


def test_one_model_clean_order():
    ranking = rank_candidates({"m": [0.1, 0.9, 0.5, 0.3]})
    assert ranking.preference == pytest.approx([0, 1, 2 / 3, 1 / 3])
    assert ranking.rank == [4, 1, 2, 3]


def test_five_judges_of_four_candidates():
    """Votes of Algorithm 1: shares on a grid of 1/15 that sum to k/2; only the order within a judge counts."""
    orders = [
        [3.0, 2.0, 1.0, 0.0],
        [3.0, 1.0, 2.0, 0.0],
        [2.0, 3.0, 0.0, 1.0],
        [3.0, 2.0, 1.0, 0.0],
        [0.0, 3.0, 1.0, 2.0],
    ]
    scores = {f"judge {number}": order for number, order in enumerate(orders)}
    shares = rank_candidates(scores).preference
    assert shares == pytest.approx([11 / 15, 11 / 15, 5 / 15, 3 / 15])
    assert sum(shares) == pytest.approx(2)
    bent = {name: [math.exp(3 * value) - 7 for value in values] for name, values in scores.items()}
    assert rank_candidates(bent).preference == shares
    indifferent = scores | {"judge 4": [0.5] * 4}  # no ties are won: one judge in five adds nothing
    assert sum(rank_candidates(indifferent).preference) == pytest.approx(1.6)


def test_scales_do_not_mix_each_model_has_one_vote():
    ranking = rank_candidates({"small": [1.0, 2.0, 3.0], "huge": [3e6, 2e6, 1e6], "third": [2.0, 3.0, 1.0]})
    assert ranking.preference == pytest.approx([3 / 6, 4 / 6, 2 / 6])
    assert ranking.rank == [2, 1, 3]


def test_a_tie_is_nobodys_win_and_stays_a_tie():
    ranking = rank_candidates({"m": [1.0, 1.0, 0.0]})
    assert ranking.preference == [0.5, 0.5, 0.0]
    assert ranking.rank == [1, 1, 3]
    opposed = rank_candidates({"a": [1.0, 0.0], "b": [0.0, 1.0]})
    assert opposed.rank == [1, 1]


def test_missing_scores_follow_the_named_rule():
    scores = {"a": [1.0, 0.0], "b": [NAN, 5.0]}
    assert rank_candidates(scores).voters == ("a",)
    assert rank_candidates(scores).rank == [1, 2]
    assert rank_candidates(scores, missing="skip_row") is None
    assert rank_candidates({"b": [NAN, 5.0]}) is None


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="skip_model"):
        rank_candidates({"a": [1.0, 0.0]}, missing="zero")
    with pytest.raises(DataError, match="same two or more"):
        rank_candidates({"a": [1.0, 0.0], "b": [1.0]})
    with pytest.raises(DataError):
        rank_candidates({"a": [1.0]})


@given(st.lists(st.lists(st.integers(0, 4), min_size=4, max_size=4), min_size=1, max_size=5), st.permutations(range(4)))
def test_properties(table, order):
    scores = {str(n): [float(v) for v in row] for n, row in enumerate(table)}
    ranking = rank_candidates(scores)
    assert sum(ranking.preference) <= 2 + 1e-9  # k / 2, reached without ties
    assert all(0 <= p <= 1 for p in ranking.preference)
    for i in range(4):
        for j in range(4):
            assert (ranking.rank[i] < ranking.rank[j]) == (ranking.preference[i] > ranking.preference[j])
    moved = rank_candidates({name: [row[i] for i in order] for name, row in scores.items()})
    assert moved.preference == [ranking.preference[i] for i in order]


def test_families_share_one_vote_and_weights_count():
    scores = {"clip1": [2.0, 1.0], "clip2": [2.0, 1.0], "other": [1.0, 2.0]}
    assert rank_candidates(scores).preference == pytest.approx([2 / 3, 1 / 3])
    one_family = {"clip1": Voter(family="clip"), "clip2": Voter(family="clip")}
    assert rank_candidates(scores, voters=one_family).rank == [1, 1]
    assert rank_candidates(scores, voters={"other": Voter(weight=4.0)}).preference == pytest.approx([2 / 6, 4 / 6])
    # a family's vote is whole again when one of its models says nothing
    scores["clip2"] = [NAN, 1.0]
    assert rank_candidates(scores, voters=one_family).preference == pytest.approx([0.5, 0.5])


def test_weights_that_no_float_holds_still_tie_exactly():
    voters = {name: Voter(weight=0.1) for name in "abc"} | {"d": Voter(weight=0.3)}
    scores = {name: [1.0, 0.0] for name in "abc"} | {"d": [0.0, 1.0]}
    assert rank_candidates(scores, voters=voters).rank == [1, 1]


def test_a_lead_within_the_tie_is_no_win():
    assert rank_candidates({"m": [0.50, 0.49, 0.1]}, voters={"m": Voter(tie=0.05)}).rank == [1, 1, 3]


def test_judges_vote_by_their_comparisons_even_in_a_circle():
    circle = {"judge": [0.9, 0.1, 0.9]}  # 0 beats 1, 2 beats 0, 1 beats 2
    ranking = rank_candidates({"judge": [0.5, 0.5, 0.5]}, comparisons=circle)
    assert ranking.rank == [1, 1, 1] and ranking.preference == [0.5, 0.5, 0.5]
    assert rank_candidates({"judge": [0.5] * 3}, comparisons={"judge": [0.9, NAN, 0.9]}) is None
    near = rank_candidates({"judge": [0.5] * 2}, comparisons={"judge": [0.6]}, voters={"judge": Voter(tie=0.2)})
    assert near.rank == [1, 2]  # `tie` is about scores; a judge's verdict is one


def test_weighted_sums_and_given_orders():
    voters = {"a": Voter(weight=1.0), "b": Voter(weight=10.0)}
    assert rank_by_sum({"a": [5.0, 0.0, 1.0], "b": [0.0, 1.0, 1.0]}, voters).rank == [3, 2, 1]
    assert rank_by_sum({"a": [5.0, 0.0], "b": [NAN, 1.0]}, voters).voters == ("a",)
    assert rank_by_sum({"a": [5.0, 0.0], "b": [NAN, 1.0]}, voters, missing="skip_row") is None
    assert rank_by_given([0.0, 1.0, 1.0]).preference == [0.0, 0.5, 0.5]


def test_sums_that_no_float_holds_still_tie_exactly():
    voters = {"a": Voter(weight=0.1), "b": Voter(weight=0.3)}
    assert rank_by_sum({"a": [3.0, 0.0], "b": [0.0, 1.0]}, voters).rank == [1, 1]  # in floats 0.3 < 0.1 * 3


def test_a_negative_weight_turns_a_score_around_in_a_sum():
    voters = {"quality": Voter(weight=1.0), "nudity": Voter(weight=-2.0)}
    assert rank_by_sum({"quality": [1.0, 0.5], "nudity": [1.0, 0.0]}, voters).rank == [2, 1]

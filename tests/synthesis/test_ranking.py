"""Votes of several reward models (RankDPO, Algorithm 1)."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.ranking import rank_candidates

NAN = math.nan


def test_one_model_clean_order():
    ranking = rank_candidates({"m": [0.1, 0.9, 0.5, 0.3]})
    assert ranking.preference == pytest.approx([0, 1, 2 / 3, 1 / 3])
    assert ranking.rank == [4, 1, 2, 3]


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

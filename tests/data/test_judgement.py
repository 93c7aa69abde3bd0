"""Numbers at the boundary, ranks and shares of wins."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.judgement import as_number, ranks, read_judgement, share_of_wins
from diffalign.errors import DataError

finite = st.floats(-1e6, 1e6)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=6))
def test_scores_written_as_text_order_as_numbers(values: list[int]) -> None:
    """Peers' slip 13: compared as text, '9' beats '10'."""
    as_text = read_judgement({"scores": {"judge": [str(value) for value in values]}}, len(values), "row 0")
    assert as_text == read_judgement({"scores": {"judge": values}}, len(values), "row 0")
    assert as_text.rank[values.index(max(values))] == 1


def test_nine_is_below_ten() -> None:
    judgement = read_judgement({"scores": {"judge": ["9", "10"]}}, 2, "row 0")
    assert judgement.rank == [2, 1] and judgement.preference == [0.0, 1.0]
    assert judgement.scores == {"judge": [9.0, 10.0]}


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), "nan"])
def test_what_is_missing_is_missing_and_no_number(value: object) -> None:
    assert math.isnan(as_number(value, "row 0"))


@pytest.mark.parametrize("value", ["nine", "9,5", [9], True, float("inf"), "-inf", b"9"])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"row 3, scores\[0\].*number, got"):
        as_number(value, "row 3, scores[0]")


@given(st.lists(finite, min_size=2, max_size=6))
def test_shares_of_wins_add_up_and_agree_with_ranks(values: list[float]) -> None:
    share = share_of_wins(values)
    assert sum(share) == pytest.approx(len(values) / 2)
    assert all(0 <= value <= 1 for value in share)
    assert ranks(share) == ranks(values)


def test_equal_values_tie() -> None:
    assert ranks([3.0, 5.0, 3.0, 1.0]) == [2, 1, 2, 4]
    assert share_of_wins([1.0, 1.0]) == [0.5, 0.5]


def test_ranks_alone_give_shares_of_wins() -> None:
    judgement = read_judgement({"rank": [3, 1, 1]}, 3, "row 0")
    assert judgement.rank == [3, 1, 1]
    assert judgement.preference == [0.0, 0.75, 0.75]


@pytest.mark.parametrize(
    "scores",
    [
        {"a": [1, None], "b": [0.5, 0.25]},
        [{"name": "a", "values": [1, None]}, {"name": "b", "values": [0.5, 0.25]}],
        [{"a": 1, "b": 0.5}, {"b": 0.25}],
    ],
)
def test_scores_are_read_in_three_forms(scores: object) -> None:
    read = read_judgement({"scores": scores, "rank": [1, 2]}, 2, "row 0").scores
    assert read["b"] == [0.5, 0.25] and read["a"][0] == 1.0 and math.isnan(read["a"][1])


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({}, "expected `preference`, `rank` or `scores`"),
        ({"preference": [1.0]}, "preference: expected 2 numbers, one per image, got 1"),
        ({"preference": [1.0, float("nan")]}, r"preference\[1\].*NaN"),
        ({"preference": [1.0, None]}, r"preference\[1\].*NaN"),
        ({"preference": [21.5, 20.0]}, r"preference\[0\].*\[0, 1\], got 21.5.*`scores`"),
        ({"rank": [1, 1.5]}, r"rank\[1\].*whole number from 1"),
        ({"rank": [0, 1]}, r"rank\[0\].*whole number from 1"),
        ({"preference": [1.0, 0.0], "rank": [2, 1]}, "contradict"),
        ({"scores": {"judge": [1.0, None]}}, r"scores\['judge'\]\[1\].*NaN"),
        ({"scores": {"a": [1, 2], "b": [2, 1]}}, r"several scores \(a, b\)"),
        ({"scores": "0.5"}, "scores: expected"),
    ],
)
def test_a_judgement_that_cannot_be_used_names_row_cell_and_remedy(cells: dict, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_judgement(cells, 2, "row 7")
    assert str(caught.value).startswith("row 7")


def test_a_named_score_decides() -> None:
    cells = {"scores": {"a": [1, 2], "b": [2, 1]}, "rank": [1, 2]}
    assert read_judgement(cells, 2, "row 0", score="a").rank == [2, 1]
    with pytest.raises(DataError, match="named 'c', got"):
        read_judgement(cells, 2, "row 0", score="c")

"""Which pairs are compared, and what becomes of ties."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffalign.data.judgement import ranks, share_of_wins
from diffalign.data.pairs import Example, curriculum, select_lists, select_pairs
from diffalign.errors import ConfigError


@dataclass
class Rows:
    """Judgements without pictures."""

    preferences: list[list[float]]

    def __len__(self) -> int:
        return len(self.preferences)

    def preference(self, index: int) -> list[float]:
        return self.preferences[index]

    def rank(self, index: int) -> list[int]:
        return ranks(self.preferences[index])


LISTS = Rows([[0.0, 1.0], [0.5, 0.5], [0.2, 1.0, 0.2, 0.6]])


def test_best_and_worst_of_each_row() -> None:
    examples, counts = select_pairs(LISTS)
    assert examples == [Example(0, (1, 0), preference=(1.0, 0.0)), Example(2, (1, 2), preference=(1.0, 0.2))]
    assert counts == {
        "rows": 3, "pairs": 2, "ties_dropped": 1, "ties_soft": 0, "below_margin": 0, "rows_without_pair": 1,
    }  # fmt: skip


def test_neighbours_and_all_pairs() -> None:
    adjacent, counts = select_pairs(LISTS, pairs="adjacent")
    assert [e.candidates for e in adjacent if e.row == 2] == [(1, 3), (3, 0)] and counts["ties_dropped"] == 2
    every, counts = select_pairs(LISTS, pairs="all")
    assert [e.candidates for e in every if e.row == 2] == [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)]
    assert counts["ties_dropped"] == 2


def test_a_tie_never_counts_as_a_win() -> None:
    """Peers' slip 2: dropped and counted by default, or kept with probability 1/2."""
    ties = Rows([[0.5, 0.5]] * 3)
    assert select_pairs(ties) == (
        [],
        {"rows": 3, "pairs": 0, "ties_dropped": 3, "ties_soft": 0, "below_margin": 0, "rows_without_pair": 3},
    )
    examples, counts = select_pairs(ties, ties="soft")
    assert [e.probability for e in examples] == [0.5] * 3 and counts["ties_soft"] == 3


def test_the_margin_drops_and_counts() -> None:
    examples, counts = select_pairs(LISTS, pairs="all", min_margin=0.5)
    assert [e.candidates for e in examples if e.row == 2] == [(1, 0), (1, 2)]
    assert counts["below_margin"] == 3 and counts["ties_dropped"] == 2


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=5), min_size=1, max_size=4))
def test_the_first_candidate_always_has_the_better_rank(values: list[list[int]]) -> None:
    rows = Rows([share_of_wins(row) for row in values])
    for ties in ("drop", "soft"):
        examples, counts = select_pairs(rows, pairs="all", ties=ties)
        for example in examples:
            better, worse = (values[example.row][c] for c in example.candidates)
            assert (better > worse) == (example.probability == 1.0) and better >= worse
        total = sum(len(list(combinations(row, 2))) for row in values)
        assert counts["pairs"] + counts["ties_dropped"] == total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "best-worst"}, "Did you mean 'best_worst'"),
        ({"ties": "sof"}, "Did you mean 'soft'"),
        ({"min_margin": -0.1}, "min_margin"),
        ({"ties": "soft", "min_margin": 0.1}, "choose one"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select_pairs(LISTS, **options)


def test_lists_are_best_first_and_drop_only_what_teaches_nothing() -> None:
    lists, counts = select_lists(LISTS)
    assert [example.candidates for example in lists] == [(1, 0), (1, 3, 0, 2)]
    assert lists[1].preference == (1.0, 0.6, 0.2, 0.2)
    assert counts == {"rows": 3, "lists": 2, "ties_dropped": 1, "below_margin": 0}
    short, _ = select_lists(LISTS, list_size=3)
    assert [example.candidates for example in short] == [(1, 0), (1, 0, 2)]
    assert select_lists(LISTS, min_margin=0.9)[1]["below_margin"] == 1
    with pytest.raises(ConfigError, match="at least two"):
        select_lists(LISTS, list_size=1)


def test_a_curriculum_goes_from_clear_to_close() -> None:
    examples, _ = select_pairs(Rows([[0.0, 1.0], [0.4, 0.6], [0.0, 0.7], [0.5, 0.6]]))
    assert curriculum(examples, 2) == [[0, 2], [1, 3]]
    assert curriculum(examples, 1) == [[0, 2, 1, 3]]
    with pytest.raises(ConfigError, match="at least as many"):
        curriculum(examples, 5)

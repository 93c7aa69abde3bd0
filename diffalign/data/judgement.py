"""Who won: numbers at the boundary, ranks, shares of wins, and their agreement with one another."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..errors import DataError

MISSING = math.nan


@dataclass(frozen=True)
class Judgement:
    """What is known about the k candidates of a row.

    Args:
        preference: k shares of wins in [0, 1].
        rank: k ranks; 1 is best, equal ranks are ties.
        scores: raw scores by reward model, k each; NaN where missing.
    """

    preference: list[float]
    rank: list[int]
    scores: dict[str, list[float]]


def as_number(value: Any, where: str) -> float:
    """A float from a table's cell, so that 9 < 10 also holds for the texts '9' and '10'.

    Returns:
        The number; NaN when the cell is missing (None, NaN, an empty text).

    Raises:
        DataError: the cell is no number, or infinite.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return MISSING
    number = None
    if not isinstance(value, bool) and isinstance(value, (numbers.Number, str)):
        try:
            number = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            number = None
    if number is None:
        raise DataError(
            f"{where}: expected a number, got {value!r}. Write it as a number, or leave it empty if missing."
        )
    if math.isinf(number):
        raise DataError(f"{where}: expected a finite number, got {value!r}. Leave a failed judgement empty.")
    return number


def ranks(values: Sequence[float | Fraction]) -> list[int]:
    """Rank of each value, the highest first: 1 plus the number of higher ones, so equal values tie."""
    return [1 + sum(other > value for other in values) for value in values]


def share_of_wins(values: Sequence[float]) -> list[float]:
    """Share of the other candidates that each one beats, a tie counting half (k >= 2 values, none missing)."""
    return [
        (sum(value > other for other in values) + (sum(value == other for other in values) - 1) / 2) / (len(values) - 1)
        for value in values
    ]


def read_scores(value: Any, count: int, where: str) -> dict[str, list[float]]:
    """Raw scores by reward model, k floats each, from any of the three ways people write them.

    Args:
        value: ``{name: [k numbers]}``, ``[{"name": name, "values": [k numbers]}, ...]`` (as stored), or one
            ``{name: number}`` per candidate.
        count: k.
        where: named in errors.
    """
    if value is None:
        return {}
    if isinstance(value, Mapping):
        table = {str(name): values for name, values in value.items() if values is not None}
    elif _is_list(value) and all(isinstance(item, Mapping) and set(item) == {"name", "values"} for item in value):
        table = {str(item["name"]): item["values"] for item in value}
    elif _is_list(value) and len(value) == count and all(item is None or isinstance(item, Mapping) for item in value):
        names = dict.fromkeys(str(name) for item in value if item for name in item)
        table = {name: [None if item is None else item.get(name) for item in value] for name in names}
    else:
        raise DataError(
            f"{where}, scores: expected {{reward model: [{count} numbers]}}, got {type(value).__name__}. "
            "See docs/data-format.md."
        )
    return {name: _numbers(values, count, f"{where}, scores[{name!r}]") for name, values in table.items()}


def read_judgement(row: Mapping[str, Any], count: int, where: str, *, score: str | None = None) -> Judgement:
    """The judgement of a row from whichever of `preference`, `rank` and `scores` it has.

    Args:
        row: the cells of a row.
        count: number k of its images.
        where: named in errors.
        score: reward model whose scores decide; None takes `preference`, then `rank`, then the only score.

    Raises:
        DataError: nothing decides, a deciding number is missing, or preference and rank contradict each other.
    """
    scores = read_scores(row.get("scores"), count, where)
    if score is not None:
        if score not in scores:
            raise DataError(f"{where}, scores: expected a score named {score!r}, got {sorted(scores) or 'none'}.")
        return _from_values(scores[score], scores, f"{where}, scores[{score!r}]")
    if row.get("preference") is not None:
        preference = _present(_numbers(row["preference"], count, f"{where}, preference"), f"{where}, preference")
        for index, value in enumerate(preference):
            if not 0.0 <= value <= 1.0:
                raise DataError(
                    f"{where}, preference[{index}]: expected a share of wins in [0, 1], got {value}. "
                    "Raw scores belong in `scores`."
                )
        rank = ranks(preference)
        if row.get("rank") is not None:
            rank = _read_ranks(row["rank"], count, where)
            _refuse_contradiction(preference, rank, where)
        return Judgement(preference, rank, scores)
    if row.get("rank") is not None:
        rank = _read_ranks(row["rank"], count, where)
        return Judgement(share_of_wins([-value for value in rank]), rank, scores)
    if len(scores) == 1:
        name, values = next(iter(scores.items()))
        return _from_values(values, scores, f"{where}, scores[{name!r}]")
    if scores:
        raise DataError(
            f"{where}: several scores ({', '.join(sorted(scores))}) and neither `preference` nor `rank`. "
            "Say which one decides: load_preferences(..., score=NAME)."
        )
    raise DataError(f"{where}: expected `preference`, `rank` or `scores` for its {count} images, got none of them.")


def _from_values(values: list[float], scores: dict[str, list[float]], where: str) -> Judgement:
    present = _present(values, where)
    return Judgement(share_of_wins(present), ranks(present), scores)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _numbers(value: Any, count: int, where: str) -> list[float]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not _is_list(value) or len(value) != count:
        came = f"{len(value)}" if _is_list(value) else repr(value)
        raise DataError(f"{where}: expected {count} numbers, one per image, got {came}.")
    return [as_number(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _present(values: list[float], where: str) -> list[float]:
    for index, value in enumerate(values):
        if math.isnan(value):
            raise DataError(
                f"{where}[{index}]: expected a number, got NaN (missing). A missing judgement cannot decide: remove "
                'that image or the row, or load with bad_rows="drop".'
            )
    return values


def _read_ranks(value: Any, count: int, where: str) -> list[int]:
    numbers_ = _present(_numbers(value, count, f"{where}, rank"), f"{where}, rank")
    for index, number in enumerate(numbers_):
        if number != int(number) or number < 1:
            raise DataError(f"{where}, rank[{index}]: expected a whole number from 1 (best), got {number}.")
    return ranks([-number for number in numbers_])


def _refuse_contradiction(preference: list[float], rank: list[int], where: str) -> None:
    for a in range(len(rank)):
        for b in range(len(rank)):
            if rank[a] < rank[b] and preference[a] < preference[b]:
                raise DataError(
                    f"{where}: rank and preference contradict each other: image {a} has rank {rank[a]} before image "
                    f"{b} with {rank[b]}, but preference {preference[a]} below {preference[b]}. Rank 1 is the best."
                )

"""Benchmarks that are means of task means: every task weighs the same, however many prompts it has.

GenEval's overall is the mean of six task means; UniGenBench's is the mean of its primary dimensions, each the share of
test points that hold. Both are one rule: results belong to dimensions, a dimension's value is the mean of its results,
the overall value is the mean of the (primary) dimensions. An answer that cannot be read is missing: it is left out of
the value, its share is reported, and a lower bound counts it as 0. Otherwise a judge that fails on hard pictures would
raise the score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .statistics import FEWEST, Interval, cluster_ids, expanded_percentiles, interval_json, json_number

_RESAMPLES = 2000


@dataclass(frozen=True)
class Dimension:
    """One task or dimension.

    Args:
        value: mean of its results; NaN when it has none.
        lower: the same with missing results counted as 0; NaN when a result is below 0, which then bounds nothing.
        n: results.
        missing: results that could not be had.
    """

    value: float
    lower: float
    n: int
    missing: int

    def to_json(self) -> dict[str, Any]:
        value, lower = json_number(self.value), json_number(self.lower)
        return {"value": value, "lower": lower, "n": self.n, "missing": self.missing}


@dataclass(frozen=True)
class TaskResult:
    """Results of one model on a benchmark.

    Args:
        overall: mean over the primary dimensions, resampling prompts; NaN when one of them has no result.
        lower: the same with missing results counted as 0.
        dimensions: primary dimensions by name.
        parts: sub-dimensions (``primary - part``) by full name.
        missing: share of results that are missing.
        any_right: share of prompts with at least one picture all of whose results are 1; NaN when none was judged.
    """

    overall: Interval
    lower: float
    dimensions: dict[str, Dimension]
    parts: dict[str, Dimension] = field(default_factory=dict)
    missing: float = 0.0
    any_right: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """The entry in ``report.json``; NaN becomes null."""
        return {
            "overall": interval_json(self.overall, "value") | {"lower": json_number(self.lower)},
            "dimensions": {name: d.to_json() for name, d in self.dimensions.items()},
            "parts": {name: d.to_json() for name, d in self.parts.items()},
            "missing_share": self.missing,
            "prompts_with_a_right_picture": json_number(self.any_right),
        }


def primary(dimension: str) -> str:
    """``Attribute`` of ``Attribute - Color``."""
    return dimension.split(" - ", 1)[0]


def summarise(
    dimensions: Sequence[Sequence[str]], results: Sequence[Sequence[float] | None], prompts: Sequence[str]
) -> TaskResult:
    """Summarise one model's pictures.

    Args:
        dimensions: for each of N pictures the dimension of each of its points.
        results: for each picture its results in the same order, 1 and 0 or any score; None, a NaN or a list of
            another length is missing.
        prompts: N prompts; equal ones form a cluster.
    """
    names = sorted({name for own in dimensions for name in own})
    primaries = list(dict.fromkeys(primary(name) for own in dimensions for name in own))
    by_name = _table(dimensions, results, names, str)
    by_primary = _table(dimensions, results, primaries, primary)
    total, count, asked = by_primary
    ids = cluster_ids(prompts)
    overall = _overall(total.sum(0), count.sum(0))
    lower = _overall(total.sum(0), asked.sum(0)) if (total >= 0).all() else math.nan
    low, high = _interval(total, count, ids)
    points = float(asked.sum())
    subs = {name: d for name, d in _dimensions(by_name, names).items() if name != primary(name)}
    return TaskResult(
        Interval(overall, low, high),
        lower,
        _dimensions(by_primary, primaries),
        subs,
        float(1 - count.sum() / points) if points else math.nan,
        _any_right(dimensions, results, ids),
    )


def difference(
    dimensions: Sequence[Sequence[str]],
    base: Sequence[Sequence[float] | None],
    aligned: Sequence[Sequence[float] | None],
    prompts: Sequence[str],
) -> Interval:
    """Overall of ``aligned`` minus overall of ``base``, over pictures that both have results for."""
    both = [
        (None, None) if not _valid(own, a) or not _valid(own, b) else (a, b)
        for own, a, b in zip(dimensions, base, aligned, strict=True)
    ]
    names = list(dict.fromkeys(primary(name) for own in dimensions for name in own))
    first, second = (_table(dimensions, side, names, primary) for side in zip(*both, strict=True))
    overall = _overall(second[0].sum(0), second[1].sum(0)) - _overall(first[0].sum(0), first[1].sum(0))
    ids = cluster_ids(prompts)
    a, b = (_per_prompt(part, ids) for part in (first[0], second[0]))
    counts = _per_prompt(first[1], ids)
    low, high = _bounds(lambda w: _overall(w @ b, w @ counts) - _overall(w @ a, w @ counts), len(counts))
    return Interval(float(overall), low, high)


Table = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _table(
    dimensions: Sequence[Sequence[str]], results: Sequence[Sequence[float] | None], names: list[str], key: Any
) -> Table:
    """(N, D) sums of results, numbers of results, numbers of points asked for."""
    place = {name: i for i, name in enumerate(names)}
    total, count, asked = (np.zeros((len(dimensions), len(names))) for _ in range(3))
    for row, (own, got) in enumerate(zip(dimensions, results, strict=True)):
        for number, name in enumerate(own):
            column = place[key(name)]
            asked[row, column] += 1
            if got is not None and _valid(own, got):
                total[row, column] += got[number]
                count[row, column] += 1
    return total, count, asked


def _valid(own: Sequence[str], got: Sequence[float] | None) -> bool:
    return got is not None and len(got) == len(own) and all(math.isfinite(value) for value in got)


def _overall(total: NDArray[np.float64], count: NDArray[np.float64]) -> Any:
    """Mean over the last axis of the dimensions' means; NaN when a dimension has nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total / count).mean(-1)


def _interval(total: NDArray[np.float64], count: NDArray[np.float64], ids: NDArray[np.int64]) -> tuple[float, float]:
    sums, counts = _per_prompt(total, ids), _per_prompt(count, ids)
    return _bounds(lambda w: _overall(w @ sums, w @ counts), len(counts))


def _per_prompt(table: NDArray[np.float64], ids: NDArray[np.int64]) -> NDArray[np.float64]:
    result = np.zeros((int(ids.max()) + 1 if len(ids) else 0, table.shape[1]))
    np.add.at(result, ids, table)
    return result


def _bounds(statistic: Any, units: int) -> tuple[float, float]:
    """Interval from resampled prompts. Draws that miss a whole dimension say nothing about the overall value."""
    if units < FEWEST:
        return math.nan, math.nan
    weights = np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), size=_RESAMPLES).astype(float)
    values = np.asarray(statistic(weights))
    values = values[np.isfinite(values)]
    return expanded_percentiles(values, units) if len(values) >= _RESAMPLES // 2 else (math.nan, math.nan)


def _dimensions(table: Table, names: list[str]) -> dict[str, Dimension]:
    total, count, asked = (part.sum(0) for part in table)
    return {
        name: Dimension(
            float(total[i] / count[i]) if count[i] else math.nan,
            float(total[i] / asked[i]) if (table[0][:, i] >= 0).all() else math.nan,
            int(count[i]),
            int(asked[i] - count[i]),
        )
        for i, name in enumerate(names)
    }


def _any_right(
    dimensions: Sequence[Sequence[str]], results: Sequence[Sequence[float] | None], ids: NDArray[np.int64]
) -> float:
    judged, right = set(), set()
    for own, got, prompt in zip(dimensions, results, ids.tolist(), strict=True):
        if got is not None and _valid(own, got):
            judged.add(prompt)
            if all(value == 1 for value in got):
                right.add(prompt)
    return len(right) / len(judged) if judged else math.nan

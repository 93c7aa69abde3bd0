"""Paired comparisons and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ..errors import DataError

_RESAMPLES = 10_000
_CELLS = 4_000_000  # counts held in memory at once while resampling
FEWEST = 6  # units that are resampled; of fewer, resamples hold too few different means to reach 95 % of anything


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval. NaN bounds: too few pairs to say anything."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedResult:
    """Two systems compared on the same (prompt, seed) pairs under one score.

    Args:
        base: mean score of the base.
        aligned: mean score of the aligned model.
        difference: aligned - base.
        win_rate: share of pairs the aligned model wins, a tie counting half.
        wins, ties, losses: shares of pairs.
        n: pairs with both scores.
        missing: pairs left out because a score is missing.
        prompts: different prompts among the n pairs; the units that are resampled.
    """

    base: float
    aligned: float
    difference: Interval
    win_rate: Interval
    wins: float
    ties: float
    losses: float
    n: int
    missing: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """The entry of one score in ``report.json``; NaN becomes null."""
        return {
            "base": json_number(self.base),
            "aligned": json_number(self.aligned),
            "difference": {**interval_json(self.difference, "mean"), "n": self.n},
            "win_rate": {
                **interval_json(self.win_rate, "value"),
                "wins": json_number(self.wins),
                "ties": json_number(self.ties),
                "losses": json_number(self.losses),
            },
            "missing": self.missing,
            "resampled_prompts": self.prompts,
        }


def compare_paired(
    base: ArrayLike, aligned: ArrayLike, prompts: Sequence[Hashable], *, confidence: float = 0.95, seed: int = 0
) -> PairedResult:
    """Compare two systems pair by pair.

    Pictures of one prompt are not independent, so whole prompts are resampled, each with all its seeds. With a single
    prompt its pairs are resampled, and the interval speaks about that prompt alone.

    Args:
        base: (N,) scores of the base; NaN is missing.
        aligned: (N,) scores of the aligned model on the same (prompt, seed) pairs.
        prompts: N prompts (or other keys); equal ones form a cluster.
        confidence: of both intervals.
        seed: of the resampling.

    Raises:
        DataError: the three differ in length.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(prompts) != len(first):
        raise DataError(
            f"expected as many base scores, aligned scores and prompts, got {first.shape}, {second.shape} and "
            f"{len(prompts)}."
        )
    kept = np.isfinite(first) & np.isfinite(second)
    first, second = first[kept], second[kept]
    clusters = cluster_ids([prompt for prompt, keep in zip(prompts, kept, strict=True) if keep])
    outcome = np.sign(second - first)  # 1 win, 0 tie, -1 loss
    n = len(first)
    share = (lambda sign: float(np.mean(outcome == sign))) if n else (lambda sign: math.nan)
    return PairedResult(
        base=float(first.mean()) if n else math.nan,
        aligned=float(second.mean()) if n else math.nan,
        difference=bootstrap_mean(second - first, clusters, confidence=confidence, seed=seed),
        win_rate=_share((outcome + 1) / 2, clusters, confidence, seed),
        wins=share(1),
        ties=share(0),
        losses=share(-1),
        n=n,
        missing=int((~kept).sum()),
        prompts=int(clusters.max()) + 1 if n else 0,
    )


def _share(outcomes: NDArray[np.float64], clusters: NDArray[np.int64], confidence: float, seed: int) -> Interval:
    """Mean of outcomes in [0, 1]; resampling makes nothing of outcomes that are all wins or all losses."""
    if len(outcomes) and outcomes.min() == outcomes.max() != 0.5:
        return wilson(float(outcomes[0]), len(set(clusters.tolist())), confidence)
    interval = bootstrap_mean(outcomes, clusters, confidence=confidence, seed=seed)
    low, high = np.clip((interval.low, interval.high), 0.0, 1.0).tolist()
    return Interval(interval.mean, low, high)


def wilson(share: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval (1927) for a share of ``n`` independent votes: five of five are [0.57, 1]."""
    z2 = float(stats.norm.ppf((1 + confidence) / 2)) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Interval(share, max(0.0, middle - reach), min(1.0, middle + reach))


@dataclass(frozen=True)
class SignTest:
    """Two-sided exact sign test over prompts.

    Args:
        wins, losses, ties: prompts whose mean difference is above, below and at zero.
        p: probability of a split at least as uneven when neither model is better; 1 when every prompt is a tie, NaN
            without prompts.
    """

    wins: int
    losses: int
    ties: int
    p: float


def sign_test(base: ArrayLike, aligned: ArrayLike, prompts: Sequence[Hashable]) -> SignTest:
    """Is the aligned model better on more prompts than it is worse on?

    The pictures of a prompt are averaged first: they are not independent. Ties say nothing and are left out. For a
    right-or-wrong score with one picture a prompt this is McNemar's exact test.

    Args:
        base, aligned: (N,) scores of the same (prompt, seed) pairs; NaN is missing.
        prompts: N prompts; equal ones form a cluster.
    """
    change = np.asarray(aligned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    kept = np.isfinite(change)
    ids = cluster_ids([prompt for prompt, keep in zip(prompts, kept, strict=True) if keep])
    if not len(ids):
        return SignTest(0, 0, 0, math.nan)
    means = np.bincount(ids, weights=change[kept]) / np.bincount(ids)
    size = np.bincount(ids, weights=np.abs(change[kept])) / np.bincount(ids)
    means[np.abs(means) <= 1e-6 * size] = 0.0  # changes that cancel up to the rounding of fp32 scores are a tie
    wins, losses = int((means > 0).sum()), int((means < 0).sum())
    p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return SignTest(wins, losses, len(means) - wins - losses, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted so that the chance of even one false claim among all of them stays at the level asked for.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure". NaN stays NaN and counts as no test.
    """
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for place, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, p * (len(known) - place)))
        adjusted[index] = highest
    return adjusted


def bootstrap_mean(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Mean of ``values`` with a cluster-bootstrap interval.

    The percentile interval of few units is too narrow; its percentiles are widened to those of Student's t with m - 1
    degrees of freedom (the "expanded percentile interval" of Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 5.3). With one cluster only, the values themselves are resampled. Of fewer than ``FEWEST`` units
    the interval is Student's own.

    Args:
        values: (N,) finite numbers.
        clusters: (N,) ids 0 .. m - 1 of what is resampled together; None resamples the values one by one.
        confidence: probability with which the interval is meant to hold the true mean.
        seed: of the resampling.
        resamples: how many.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0:
        return Interval(math.nan, math.nan, math.nan)
    ids = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    if ids.max() == 0:
        ids = np.arange(len(values))
    sums: NDArray[np.float64] = np.bincount(ids, weights=values).astype(np.float64)
    counts: NDArray[np.float64] = np.bincount(ids).astype(np.float64)
    m = len(sums)
    if m < 2:
        return Interval(float(values.mean()), math.nan, math.nan)
    if m < FEWEST:
        residuals = sums - values.mean() * counts
        error = math.sqrt((residuals**2).sum() * m / (m - 1)) / len(values)
        reach = float(stats.t.ppf((1 + confidence) / 2, m - 1)) * error
        return Interval(float(values.mean()), float(values.mean()) - reach, float(values.mean()) + reach)
    means = _resampled_means(sums, counts, resamples, np.random.default_rng(seed))
    return Interval(float(values.mean()), *expanded_percentiles(means, m, confidence))


def expanded_percentiles(resampled: ArrayLike, units: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds from resampled statistics of ``units`` >= 2 resampled units; see :func:`bootstrap_mean`."""
    tail = stats.norm.cdf(math.sqrt(units / (units - 1)) * stats.t.ppf((1 - confidence) / 2, units - 1))
    low, high = np.quantile(np.asarray(resampled), [tail, 1 - tail])
    return float(low), float(high)


def cluster_ids(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    """(N,) whole numbers from 0 in order of first appearance; equal keys share one."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def _resampled_means(
    sums: NDArray[np.float64], counts: NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(resamples,) means of m clusters drawn with replacement; larger clusters weigh more, as they do in the mean."""
    m = len(sums)
    means = []
    for start in range(0, resamples, block := max(1, _CELLS // m)):
        drawn = rng.multinomial(m, np.full(m, 1 / m), size=min(block, resamples - start))
        means.append((drawn @ sums) / (drawn @ counts))
    return np.concatenate(means)


def json_number(value: float) -> float | None:
    """JSON has neither NaN nor infinity: null stands for a number that is missing."""
    return value if math.isfinite(value) else None


def interval_json(interval: Interval, name: str) -> dict[str, Any]:
    """``{name: mean, "ci95": [low, high]}``; NaN becomes null, and so do bounds of which one is missing."""
    values = {key: json_number(value) for key, value in asdict(interval).items()}
    known = values["low"] is not None and values["high"] is not None
    return {name: values["mean"], "ci95": [values["low"], values["high"]] if known else None}

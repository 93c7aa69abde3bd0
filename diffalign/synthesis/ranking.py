"""One order from many judges: votes (RankDPO, Karthik et al. 2024, Algorithm 1), weighted sums, or a given order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Literal

from ..data.judgement import ranks
from ..errors import ConfigError, DataError

MissingRule = Literal["skip_model", "skip_row"]


@dataclass(frozen=True)
class Ranking:
    """The order of the k candidates of a prompt.

    Args:
        preference: k shares of wins in [0, 1].
        rank: k ranks; 1 is best, equal ranks are ties.
        voters: names of the reward models that had a say.
    """

    preference: list[float]
    rank: list[int]
    voters: tuple[str, ...]


@dataclass(frozen=True)
class Voter:
    """How much a reward model counts.

    Args:
        weight: of its votes, or of its raw scores in a sum.
        family: models of one family (built on one backbone) share one vote, since they err together.
        tie: scores that differ by no more are equal.
    """

    weight: float = 1.0
    family: str | None = None
    tie: float = 0.0


def rank_candidates(
    scores: Mapping[str, Sequence[float]],
    *,
    missing: MissingRule = "skip_model",
    comparisons: Mapping[str, Sequence[float]] | None = None,
    voters: Mapping[str, Voter] | None = None,
) -> Ranking | None:
    """Let every reward model vote on every pair of candidates.

    ``preference[i]`` is the share of the n (k - 1) votes that candidate i wins. Only the order within a model counts,
    so scales never mix, and each model has one vote. Equal scores give nobody a win: a tie stays a tie.

    Args:
        scores: raw scores by reward model, k each; NaN is missing.
        missing: ``skip_model`` lets a model with a missing score among the k not vote on this prompt; ``skip_row``
            gives the whole prompt up.
        comparisons: of judges: probability that the first is better, for the k(k-1)/2 pairs in the order of
            ``itertools.combinations``. They take the place of the judge's scores.
        voters: weights, families and ties by name; every model has one vote where this says nothing.

    Returns:
        The ranking, or None when the rule leaves no vote.

    Raises:
        ConfigError: unknown rule.
        DataError: fewer than two candidates, or models that scored different numbers of them.
    """
    if missing not in ("skip_model", "skip_row"):
        raise ConfigError(f"missing must be 'skip_model' or 'skip_row', got {missing!r}.")
    k = _count(scores)
    compared, known = comparisons or {}, voters or {}
    wins = {
        name: wins_of(values, compared.get(name), known.get(name, Voter()).tie)
        for name, values in scores.items()
        if is_complete(compared.get(name, values))
    }
    weights = {name: weight for name, weight in vote_weights(wins, known).items() if weight > 0}
    if not weights or (missing == "skip_row" and len(wins) < len(scores)):
        return None
    votes = sum(weights.values()) * (k - 1)
    # Fractions are compared, so that equal shares tie exactly.
    total = [sum((weight * wins[name][i] for name, weight in weights.items()), Fraction(0)) for i in range(k)]
    return Ranking([float(own / votes) for own in total], ranks(total), tuple(weights))


def rank_by_sum(
    scores: Mapping[str, Sequence[float]], voters: Mapping[str, Voter], *, missing: MissingRule = "skip_model"
) -> Ranking | None:
    """Order by the sum of weight x raw score; ``preference`` is the share of the other candidates that each beats.

    Weights bring the scores to one scale and are the caller's choice: nothing is standardised behind his back. A
    voter's family and tie mean nothing here.
    """
    k = _count(scores)
    present = {name: values for name, values in scores.items() if is_complete(values)}
    if not present or (missing == "skip_row" and len(present) < len(scores)):
        return None
    total = [Fraction(0)] * k
    for name, values in present.items():  # Fractions are added, so that equal sums tie exactly
        weight = Fraction(str(voters.get(name, Voter()).weight))
        total = [own + weight * Fraction(value) for own, value in zip(total, values, strict=True)]
    return _from_order(total, tuple(present))


def rank_by_given(values: Sequence[float]) -> Ranking:
    """Order by one number per candidate, for example the weight of the pipeline that drew it; no model has a say."""
    return _from_order(list(values), ())


def wins_of(values: Sequence[float], comparisons: Sequence[float] | None = None, tie: float = 0.0) -> list[int]:
    """How many of the others each of k candidates beats; arguments as of :func:`verdicts`."""
    wins = [0] * len(values)
    for (i, j), verdict in zip(combinations(range(len(values)), 2), verdicts(values, comparisons, tie), strict=True):
        wins[i] += verdict > 0
        wins[j] += verdict < 0
    return wins


def verdicts(values: Sequence[float], comparisons: Sequence[float] | None = None, tie: float = 0.0) -> list[int]:
    """Of all k(k-1)/2 pairs: 1 where the first is better, -1 where the second is, 0 for a tie.

    Args:
        values: k scores, none missing; ignored where there are comparisons.
        comparisons: k(k-1)/2 probabilities that the first is better.
        tie: a lead in score that is no win yet.
    """
    if comparisons:
        return [(p > 0.5) - (p < 0.5) for p in comparisons]
    leads = [first - second for first, second in combinations(values, 2)]
    return [(lead > tie) - (lead < -tie) for lead in leads]


def vote_weights(names: Mapping[str, object], voters: Mapping[str, Voter]) -> dict[str, Fraction]:
    """Weight of each model's votes; those of one family share one."""
    families = [voters.get(name, Voter()).family for name in names]
    weights = {}
    for name, family in zip(names, families, strict=True):
        share = families.count(family) if family is not None else 1
        weights[name] = Fraction(str(voters.get(name, Voter()).weight)) / share
    return weights


def is_complete(values: Sequence[float]) -> bool:
    """Whether nothing is missing."""
    return not any(math.isnan(value) for value in values)


def _from_order(values: Sequence[float | Fraction], voters: tuple[str, ...]) -> Ranking:
    wins = [Fraction(sum(own > other for other in values)) for own in values]
    return Ranking([float(own / (len(values) - 1)) for own in wins], ranks(wins), voters)


def _count(scores: Mapping[str, Sequence[float]]) -> int:
    counts = {len(values) for values in scores.values()}
    if len(counts) != 1 or min(counts) < 2:
        raise DataError(f"every reward model must score the same two or more candidates, got {sorted(counts)}.")
    return counts.pop()

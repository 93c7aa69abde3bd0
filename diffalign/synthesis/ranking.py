"""One order from the scores of several reward models (RankDPO, Karthik et al. 2024, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

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


def rank_candidates(scores: Mapping[str, Sequence[float]], *, missing: MissingRule = "skip_model") -> Ranking | None:
    """Let every reward model vote on every pair of candidates.

    ``preference[i]`` is the share of the n (k - 1) votes that candidate i wins. Only the order within a model counts,
    so scales never mix, and each model has one vote. Equal scores give nobody a win: a tie stays a tie.

    Args:
        scores: raw scores by reward model, k each; NaN is missing.
        missing: ``skip_model`` lets a model with a missing score among the k not vote on this prompt; ``skip_row``
            gives the whole prompt up.

    Returns:
        The ranking, or None when the rule leaves no vote.

    Raises:
        ConfigError: unknown rule.
        DataError: fewer than two candidates, or models that scored different numbers of them.
    """
    if missing not in ("skip_model", "skip_row"):
        raise ConfigError(f"missing must be 'skip_model' or 'skip_row', got {missing!r}.")
    counts = {len(values) for values in scores.values()}
    if len(counts) != 1 or min(counts) < 2:
        raise DataError(f"every reward model must score the same two or more candidates, got {sorted(counts)}.")
    (k,) = counts
    voters = tuple(name for name, values in scores.items() if not any(math.isnan(value) for value in values))
    if not voters or (missing == "skip_row" and len(voters) < len(scores)):
        return None
    wins = [sum(scores[name][i] > other for name in voters for other in scores[name]) for i in range(k)]
    votes = len(voters) * (k - 1)
    # Whole numbers are compared, so that equal shares tie exactly.
    rank = [1 + sum(other > own for other in wins) for own in wins]
    return Ranking([float(Fraction(own, votes)) for own in wins], rank, voters)

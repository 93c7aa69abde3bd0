"""Soft labels: how sure reward scores are about a pair, in place of a bare label."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from ..errors import ConfigError, DataError
from ..objectives import soft_probability
from .pairs import Example

log = logging.getLogger(__name__)

CONTRADICTIONS = ("follow_scores", "undecided", "drop")


class Scored(Protocol):
    """What :func:`soften` needs of a dataset."""

    def scores(self, index: int) -> dict[str, list[float]]: ...


def soften(
    examples: Sequence[Example],
    dataset: Scored,
    score: str,
    score_range: tuple[float, float],
    *,
    contradiction: str = "undecided",
) -> tuple[list[Example], dict[str, int]]:
    """Give pairs the probability that their scores imply, p = sigmoid((R_w - R_l) / (R_max - R_min)) (SmPO).

    Args:
        examples: pairs, winner first.
        dataset: their table.
        score: reward model whose scores decide.
        score_range: (R_min, R_max) of that score over the data set; see ``PreferenceDataset.score_range``.
        contradiction: what a pair gets whose label's loser has the higher score: ``follow_scores`` p below 1/2, which
            trains it reversed; ``undecided`` p = 1/2, which trains nothing; ``drop`` leaves it out. A tie that was
            kept (``ties=soft``) has no label: scores decide it, whichever way they point.

    Returns:
        The pairs, and counts: `score_missing` (left out), `contradictions`.

    Raises:
        ConfigError: an unknown policy or an empty range.
        DataError: the table has no such score in any row.
    """
    if contradiction not in CONTRADICTIONS:
        raise ConfigError(f"contradiction: expected one of {', '.join(CONTRADICTIONS)}, got {contradiction!r}.")
    low, high = score_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(
            f"score_range: expected two numbers, the lower first, got {list(score_range)}. Equal scores everywhere "
            "cannot tell images apart: choose another score."
        )
    counts = {"score_missing": 0, "contradictions": 0}
    soft: list[Example] = []
    read, values = -1, None
    for example in examples:
        if example.row != read:  # the pairs of a row follow each other
            read, values = example.row, dataset.scores(example.row).get(score)
        winner, loser = (values[c] for c in example.candidates) if values is not None else (math.nan, math.nan)
        if math.isnan(winner) or math.isnan(loser):
            counts["score_missing"] += 1
            continue
        difference = torch.tensor([winner - loser], dtype=torch.float64)
        probability = float(soft_probability(difference, high - low, contradiction="follow_scores"))
        if winner < loser and example.probability != 0.5:  # a tie that was kept has no label to contradict
            counts["contradictions"] += 1
            if contradiction == "drop":
                continue
            if contradiction == "undecided":
                probability = 0.5
        soft.append(replace(example, probability=probability))
    if examples and counts["score_missing"] == len(examples):
        raise DataError(f"no pair has scores named {score!r} for both images; see `diffalign data check`.")
    log.info(
        "%d soft labels from %r: %d pairs without the score left out, %d contradict their label (%s)",
        len(soft),
        score,
        counts["score_missing"],
        counts["contradictions"],
        contradiction,
    )
    return soft, counts

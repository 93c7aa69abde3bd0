"""Running win rates of models under reward models, over the pictures of one session."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.ratings import win_rate
from ..evaluation.statistics import Interval

MAX_CELLS = 2000  # (prompt, seed, settings) remembered; the oldest go first


@dataclass(frozen=True)
class Standing:
    """One model against another under one score, on the same prompts, seeds and settings.

    Args:
        model, against: labels.
        rate: share of wins of ``model``, a tie counting half.
        wins, ties, losses: pairs.
        difference: mean of its score minus the other's; NaN without a pair.
    """

    model: str
    against: str
    rate: Interval
    wins: int
    ties: int
    losses: int
    difference: float


class Tally:
    """Scores by cell and model; a cell drawn again replaces itself and is never counted twice."""

    def __init__(self, limit: int = MAX_CELLS) -> None:
        self.limit = limit
        self._cells: OrderedDict[Hashable, tuple[str, dict[str, dict[str, float]]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cells)

    def add(self, cell: Hashable, prompt: str, model: str, scores: Mapping[str, float]) -> None:
        """Take in one picture.

        Args:
            cell: everything that pictures to compare must share.
            prompt: pictures of one prompt depend on each other.
            model: label.
            scores: by reward model; NaN where missing.
        """
        self._cells.setdefault(cell, (prompt, {}))[1][model] = dict(scores)
        self._cells.move_to_end(cell)
        while len(self._cells) > self.limit:
            self._cells.popitem(last=False)

    def scores(self) -> list[str]:
        """Names of reward models that gave at least one number."""
        found = {
            name: None
            for _, models in self._cells.values()
            for scores in models.values()
            for name, value in scores.items()
            if not math.isnan(value)
        }
        return list(found)

    def models(self) -> set[str]:
        """Labels of the models that drew any of the pictures."""
        return {model for _, models in self._cells.values() for model in models}

    def standings(self, score: str, models: Sequence[str]) -> list[Standing]:
        """Each model against the first one, where both have a score.

        Args:
            score: reward model.
            models: labels; the first is what the others are compared with.
        """
        return [self._against(score, model, models[0]) for model in models[1:]]

    def _against(self, score: str, model: str, base: str) -> Standing:
        differences, prompts = [], []
        for prompt, models in self._cells.values():
            first = models.get(model, {}).get(score, math.nan)
            second = models.get(base, {}).get(score, math.nan)
            if not math.isnan(first - second):
                differences.append(first - second)
                prompts.append(prompt)
        outcomes = [(d > 0) + 0.5 * (d == 0) for d in differences]
        return Standing(
            model,
            base,
            win_rate(outcomes, prompts),
            wins=outcomes.count(1.0),
            ties=outcomes.count(0.5),
            losses=outcomes.count(0.0),
            difference=sum(differences) / len(differences) if differences else math.nan,
        )


def best(values: Sequence[float]) -> set[int]:
    """Indices of the highest value; none when fewer than two are there, or all are equal."""
    present = [value for value in values if not math.isnan(value)]
    if len(present) < 2 or min(present) == max(present):
        return set()
    return {index for index, value in enumerate(values) if value == max(present)}

"""Everything that looks at the pictures of an evaluation: reward models, judges, a grader and plain measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reward_models import PairwiseRewardModel, RewardModel, can_score

from .appearance import MEASURES, Embedding, embed, measure
from .graders import Grader
from .pictures import Picture, open_picture
from .scores import ScoreStore, Value, as_float, judge_pairs, picture_key, score_pictures


@dataclass
class Judged:
    """What a panel says of one model's N pictures.

    Args:
        pictures: the pictures, or their files.
        scores: N scores by reward model (and grader), NaN where missing.
        points: the grader's answers for each picture, None where missing; None without a grader.
        measures: N numbers by plain measure.
        vectors: (N, d), see :func:`diffalign.evaluation.appearance.embed`.
    """

    pictures: list[Picture]
    scores: dict[str, list[float]]
    points: list[list[float] | None] | None
    measures: dict[str, list[float]]
    vectors: NDArray[np.float64]


@dataclass
class Panel:
    """Who looks.

    Args:
        labels: N prompts, one for each picture.
        reward_models: pointwise scorers and pairwise judges, with different names.
        grader: of a benchmark, with ``items``: its entry for each of the N pictures.
        embedding: see :func:`diffalign.evaluation.appearance.load_embedding`.
        folder: scores are kept here and found again; None keeps none.
    """

    labels: list[str]
    reward_models: Sequence[RewardModel | PairwiseRewardModel]
    grader: Grader | None = None
    items: Sequence[Any] | None = None
    embedding: Embedding | None = None
    folder: Path | None = None

    @property
    def names(self) -> list[str]:
        """Of all scores, in order."""
        return [model.name for model in self.reward_models] + ([self.grader.name] if self.grader else [])

    @property
    def identities(self) -> dict[str, dict[str, Any]]:
        """Of all scorers by name."""
        everyone = [*self.reward_models, *([self.grader] if self.grader else [])]
        return {one.name: one.identity for one in everyone}

    def judge(self, pictures: Sequence[Picture]) -> Judged:
        """Scores, answers and measures of one model's pictures."""
        scores = {
            model.name: score_pictures(model, pictures, self.labels, self._store(model))
            for model in self.reward_models
            if can_score(model)
        }
        points = self._grade(pictures)
        if self.grader is not None and points is not None:
            scores[self.grader.name] = [float(np.mean(got)) if got else float("nan") for got in points]
        each = [measure(picture) for picture in pictures]
        measures = {name: [one[name] for one in each] for name in MEASURES}
        return Judged(list(pictures), scores, points, measures, embed(pictures, self.embedding))

    def pairwise(self, base: Judged, aligned: Judged) -> dict[str, tuple[list[float], list[float]]]:
        """For each pairwise judge the probability that the base's picture is better, and that the aligned one is."""
        result = {}
        for judge in self.reward_models:
            if isinstance(judge, PairwiseRewardModel) and not can_score(judge):
                wins = judge_pairs(judge, base.pictures, aligned.pictures, self.labels, self._store(judge))
                result[judge.name] = [1 - p for p in wins], wins
        return result

    def _grade(self, pictures: Sequence[Picture]) -> list[list[float] | None] | None:
        grader, items = self.grader, self.items
        if grader is None or items is None:
            return None

        def ask(positions: list[int]) -> Sequence[Value]:
            return grader.grade([open_picture(pictures[i]) for i in positions], [items[i] for i in positions])

        keys = [
            picture_key(picture, f"{label} {item}")
            for picture, label, item in zip(pictures, self.labels, items, strict=True)
        ]
        return [
            got if isinstance(got, list) else None if got is None else [as_float(got)]
            for got in self._store(grader).fill(keys, ask)
        ]

    def _store(self, scorer: RewardModel | PairwiseRewardModel | Grader) -> ScoreStore:
        return ScoreStore(self.folder, scorer.name, scorer.identity)

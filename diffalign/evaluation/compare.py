"""Base and aligned model on the same prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from reward_models import PairwiseRewardModel, RewardModel

from ..errors import ConfigError
from .appearance import DIVERSITY, distance, diversity
from .lora import find_weights, lora_loaded
from .panel import Judged, Panel
from .pictures import Picture, SamplingSettings, cross, draw
from .statistics import Interval, PairedResult, SignTest, compare_paired, sign_test
from .tasks import TaskResult, difference, summarise


@dataclass(frozen=True)
class TaskComparison:
    """A benchmark's overall value of both models, and the paired difference."""

    base: TaskResult
    aligned: TaskResult
    difference: Interval


@dataclass
class Comparison:
    """Everything a report needs.

    Args:
        prompts: the P prompts.
        seeds: the S seeds each prompt was drawn with.
        base_pictures, aligned_pictures: P * S pictures (or their files), seeds running fastest.
        base_scores, aligned_scores: P * S raw scores by reward model, NaN where missing.
        results: statistics by reward model.
        scorers: identity of each reward model.
        sampling: how the pictures were drawn.
        seconds: time spent in each stage.
        name: of the aligned model.
        signs: sign test by reward model.
        by_task: means of task means by reward model; empty where the prompts have no tasks.
        appearance: statistics of plain measures (:mod:`diffalign.evaluation.appearance`), larger is not better.
        moved: for each pair, how far the aligned picture is from the base's.
    """

    prompts: list[str]
    seeds: list[int]
    base_pictures: list[Picture]
    aligned_pictures: list[Picture]
    base_scores: dict[str, list[float]]
    aligned_scores: dict[str, list[float]]
    results: dict[str, PairedResult]
    scorers: dict[str, dict[str, str | None]]
    sampling: SamplingSettings
    seconds: dict[str, float] = field(default_factory=dict)
    name: str = "aligned"
    signs: dict[str, SignTest] = field(default_factory=dict)
    by_task: dict[str, TaskComparison] = field(default_factory=dict)
    appearance: dict[str, PairedResult] = field(default_factory=dict)
    moved: list[float] = field(default_factory=list)

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each picture."""
        return cross(self.prompts, self.seeds)

    def change(self, name: str) -> list[float]:
        """aligned - base under score ``name``, one per pair; NaN where either is missing."""
        return [b - a for a, b in zip(self.base_scores[name], self.aligned_scores[name], strict=True)]


def compare(
    base: DiffusionPipeline,
    aligned: DiffusionPipeline | str | Path,
    prompts: Sequence[str],
    seeds: Sequence[int],
    reward_models: Sequence[RewardModel | PairwiseRewardModel],
    *,
    sampling: SamplingSettings | None = None,
    picture_folder: str | Path | None = None,
    progress: bool = False,
) -> Comparison:
    """Draw every (prompt, seed) with both models from the same noise, score the pictures, compare them pair by pair.

    Args:
        base: the model that alignment started from.
        aligned: a pipeline, or the folder or file of a LoRA, which is switched on in ``base`` for its turn.
        prompts: P different prompts.
        seeds: S different seeds.
        reward_models: scorers with different names.
        sampling: how pictures are drawn.
        picture_folder: pictures go to ``base/`` and ``aligned/`` in it instead of staying in memory.
        progress: show progress bars.

    Raises:
        ConfigError: nothing to compare, or something twice.
        CheckpointError: the LoRA does not fit.
    """
    sampling = sampling or SamplingSettings()
    check_inputs(prompts, seeds, reward_models)
    folder = None if picture_folder is None else Path(picture_folder)
    began = time.perf_counter()
    base_pictures = draw(base, prompts, seeds, sampling, folder and folder / "base", progress=progress)
    middle = time.perf_counter()
    if isinstance(aligned, (str, Path)):
        kind, path = find_weights(aligned)
        if kind != "lora":
            raise ConfigError(f"{path} is a whole pipeline; load it and pass the pipeline.")
        with lora_loaded(base, path):
            aligned_pictures = draw(base, prompts, seeds, sampling, folder and folder / "aligned", progress=progress)
    else:
        aligned_pictures = draw(aligned, prompts, seeds, sampling, folder and folder / "aligned", progress=progress)
    seconds = {"generate_base": middle - began, "generate_aligned": time.perf_counter() - middle}
    return compare_pictures(
        prompts, seeds, base_pictures, aligned_pictures, reward_models, sampling=sampling, seconds=seconds
    )


def compare_pictures(
    prompts: Sequence[str],
    seeds: Sequence[int],
    base_pictures: Sequence[Picture],
    aligned_pictures: Sequence[Picture],
    reward_models: Sequence[RewardModel | PairwiseRewardModel],
    *,
    sampling: SamplingSettings,
    seconds: dict[str, float] | None = None,
) -> Comparison:
    """Score and compare pictures that are already drawn; see :func:`compare` and :class:`Comparison`."""
    check_inputs(prompts, seeds, reward_models)
    began = time.perf_counter()
    panel = Panel([prompt for prompt, _ in cross(prompts, seeds)], reward_models)
    base, aligned = panel.judge(base_pictures), panel.judge(aligned_pictures)
    comparison = compare_judged(prompts, seeds, base, aligned, panel, sampling=sampling)
    comparison.seconds = {**(seconds or {}), "score": time.perf_counter() - began}
    return comparison


def compare_judged(
    prompts: Sequence[str],
    seeds: Sequence[int],
    base: Judged,
    aligned: Judged,
    panel: Panel,
    *,
    sampling: SamplingSettings,
    tasks: Sequence[str] | None = None,
    name: str = "aligned",
) -> Comparison:
    """Compare what a panel said of two models' pictures.

    Args:
        prompts: P prompts.
        seeds: S seeds.
        base, aligned: of P * S pictures each, seeds running fastest.
        panel: who judged them.
        sampling: how the pictures were drawn.
        tasks: P task names; None where there are none.
        name: of the aligned model.
    """
    labels = panel.labels
    judged = panel.pairwise(base, aligned)
    pairs = {one: judged.get(one) or (base.scores[one], aligned.scores[one]) for one in panel.names}
    cosine = panel.embedding is not None
    appearance = {one: compare_paired(base.measures[one], aligned.measures[one], labels) for one in base.measures}
    if len(seeds) > 1:
        before, after = (diversity(side.vectors, len(seeds), cosine=cosine) for side in (base, aligned))
        appearance[DIVERSITY] = compare_paired(before, after, list(prompts))
    return Comparison(
        prompts=list(prompts),
        seeds=list(seeds),
        base_pictures=base.pictures,
        aligned_pictures=aligned.pictures,
        base_scores={one: pair[0] for one, pair in pairs.items()},
        aligned_scores={one: pair[1] for one, pair in pairs.items()},
        results={one: compare_paired(*pair, labels) for one, pair in pairs.items()},
        scorers=panel.identities,
        sampling=sampling,
        name=name,
        signs={one: sign_test(*pair, labels) for one, pair in pairs.items()},
        by_task=_by_task(panel, base, aligned, pairs, tasks, len(seeds)),
        appearance=appearance,
        moved=distance(base.vectors, aligned.vectors, cosine=cosine).tolist(),
    )


def _by_task(
    panel: Panel,
    base: Judged,
    aligned: Judged,
    pairs: dict[str, tuple[list[float], list[float]]],
    tasks: Sequence[str] | None,
    seeds: int,
) -> dict[str, TaskComparison]:
    """A grader by its own dimensions, other scores by the tasks of the prompts."""
    found = {}
    own = [[task] for task in tasks for _ in range(seeds)] if tasks is not None else None
    for name, sides in pairs.items():
        before, after = ([[value] for value in side] for side in sides)
        answers: tuple[Any, Any] = (before, after)
        dimensions = own
        if panel.grader is not None and name == panel.grader.name and panel.items is not None:
            dimensions = [panel.grader.dimensions(item) for item in panel.items]
            answers = (base.points, aligned.points)
        if dimensions is not None and len({one for each in dimensions for one in each}) > 1:
            first, second = (summarise(dimensions, each, panel.labels) for each in answers)
            change = difference(dimensions, answers[0], answers[1], panel.labels)
            found[name] = TaskComparison(first, second, change)
    return found


def check_inputs(prompts: Sequence[str], seeds: Sequence[int], reward_models: Sequence[Any]) -> None:
    """Refuse nothing, and anything twice."""
    names = [model.name for model in reward_models]
    for what, items in (("prompts", list(prompts)), ("seeds", list(seeds)), ("reward models", names)):
        if not items:
            raise ConfigError(f"expected {what}, got none.")
        seen: set[Any] = set()
        for item in items:
            if item in seen:
                raise ConfigError(f"{what} must differ from each other, got {item!r} twice.")
            seen.add(item)

"""Base and aligned model on the same prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from reward_models import RewardModel

from ..errors import ConfigError
from ..synthesis.sampling import iterate_images
from .lora import find_weights, lora_loaded
from .statistics import PairedResult, compare_paired

Picture = Image.Image | Path


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn; the same for both models.

    Args:
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        batch_size: pictures drawn at once; never changes a picture.
        height: pixels; None takes the model's own.
        width: pixels; None takes the model's own.
    """

    steps: int = 25
    guidance: float = 5.0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None


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
    reward_models: Sequence[RewardModel],
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
    _check(prompts, seeds, reward_models)
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
    reward_models: Sequence[RewardModel],
    *,
    sampling: SamplingSettings,
    seconds: dict[str, float] | None = None,
) -> Comparison:
    """Score and compare pictures that are already drawn; see :func:`compare` and :class:`Comparison`."""
    _check(prompts, seeds, reward_models)
    began = time.perf_counter()
    labels = [prompt for prompt, _ in cross(prompts, seeds)]
    base_scores = {model.name: model.score(base_pictures, labels).tolist() for model in reward_models}
    aligned_scores = {model.name: model.score(aligned_pictures, labels).tolist() for model in reward_models}
    results = {name: compare_paired(base_scores[name], aligned_scores[name], labels) for name in base_scores}
    return Comparison(
        prompts=list(prompts),
        seeds=list(seeds),
        base_pictures=list(base_pictures),
        aligned_pictures=list(aligned_pictures),
        base_scores=base_scores,
        aligned_scores=aligned_scores,
        results=results,
        scorers={model.name: model.identity for model in reward_models},
        sampling=sampling,
        seconds={**(seconds or {}), "score": time.perf_counter() - began},
    )


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingSettings,
    folder: Path | None = None,
    *,
    progress: bool = False,
) -> list[Picture]:
    """Every prompt with every seed, in memory or as PNG files ``<prompt number>-<seed>.png`` in ``folder``."""
    pairs = cross(prompts, seeds)
    batches = iterate_images(
        pipeline,
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        steps=sampling.steps,
        guidance=sampling.guidance,
        batch_size=sampling.batch_size,
        height=sampling.height,
        width=sampling.width,
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(prompts) - 1))
    pictures: list[Picture] = []
    with tqdm(total=len(pairs), desc="pictures", unit="image", disable=not progress) as bar:
        for batch in batches:
            for image in batch:
                if folder is None:
                    pictures.append(image)
                    continue
                number, seed = len(pictures) // len(seeds), pairs[len(pictures)][1]
                file = folder / f"{number:0{digits}d}-{seed}.png"
                image.save(file)
                pictures.append(file)
            bar.update(len(batch))
    return pictures


def cross(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """All (prompt, seed), seeds running fastest."""
    return [(prompt, seed) for prompt in prompts for seed in seeds]


def _check(prompts: Sequence[str], seeds: Sequence[int], reward_models: Sequence[Any]) -> None:
    names = [model.name for model in reward_models]
    for what, items in (("prompts", list(prompts)), ("seeds", list(seeds)), ("reward models", names)):
        if not items:
            raise ConfigError(f"expected {what}, got none.")
        seen: set[Any] = set()
        for item in items:
            if item in seen:
                raise ConfigError(f"{what} must differ from each other, got {item!r} twice.")
            seen.add(item)

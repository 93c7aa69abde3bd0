"""A preference table from a pipeline in memory: draw k pictures for each prompt, score them, rank them, write them.

The run of :mod:`.run` does the same from settings, and survives kills. This stays beside it since it takes a pipeline
and reward models as objects, which a process that continues a run could not have, and since the tables of the
quickstart and of the shapes judge are its: their pictures are keyed by (seed, prompt, i) without a pipeline's name, and
even pictures are ranked there, while a run sets them aside. Drawing, encoding, ranking and writing are shared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from reward_models import RewardModel

from ..data.preferences import store_score_ranges
from ..data.schema import PreferenceRow, write_preferences
from ..errors import ConfigError
from ..randomness import keyed_seed
from .candidates import encode
from .card import public_name
from .ranking import MissingRule, Ranking, rank_candidates
from .sampling import generate_images, picture_seed

log = logging.getLogger(__name__)


@dataclass
class BuildReport:
    """What :func:`build_preferences` did.

    Args:
        folder: where the table is.
        rows: prompts written.
        images: pictures written.
        ties: prompts whose best two candidates share rank 1.
        all_tied: prompts whose candidates all share rank 1; they teach nothing and are dropped by training.
        set_aside: prompts without a ranking, with the reason.
        mean_scores: mean raw score of each reward model over all pictures it judged.
        seconds: time spent in each stage.
    """

    folder: Path
    rows: int = 0
    images: int = 0
    ties: int = 0
    all_tied: int = 0
    set_aside: dict[str, str] = field(default_factory=dict)
    mean_scores: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "score": 0.0})


def build_preferences(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    images_per_prompt: int,
    reward_models: Sequence[RewardModel],
    folder: str | Path,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 5.0,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    missing: MissingRule = "skip_model",
    prompts_at_once: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> BuildReport:
    """Write a table that ``load_preferences`` and ``datasets.load_dataset`` read.

    Args:
        pipeline: what draws; its ``name_or_path`` becomes the candidates' source.
        prompts: one row each; repeated prompts are refused, since their rows would be equal.
        images_per_prompt: k >= 2.
        reward_models: who ranks (:func:`rank_candidates`); all raw scores are kept.
        folder: of the table; must not hold one yet.
        seed: key of the pictures' seeds: candidate i of a prompt depends on (seed, prompt, i) alone.
        steps, guidance, batch_size, height, width: see :func:`generate_images`.
        missing: what happens to missing scores, see :func:`rank_candidates`.
        prompts_at_once: prompts whose pictures are held in memory together.
        on_progress: called with the number of pictures drawn since the last call.

    Returns:
        Counts, mean scores and times.

    Raises:
        ConfigError: fewer than two images per prompt, no or twice the same reward model, or no or repeated prompts.
        DataError: the table cannot be written, or no prompt could be ranked.
    """
    _check(prompts, images_per_prompt, reward_models)
    report = BuildReport(Path(folder))
    totals = {model.name: [0.0, 0] for model in reward_models}
    settings = {"steps": steps, "guidance": guidance, "height": height, "width": width}

    def rows() -> Iterator[PreferenceRow]:
        for start in range(0, len(prompts), prompts_at_once):
            group = list(prompts[start : start + prompts_at_once])
            repeated = [prompt for prompt in group for _ in range(images_per_prompt)]
            seeds = [keyed_seed(seed, "candidate", i) for _ in group for i in range(images_per_prompt)]
            began = time.perf_counter()
            images = generate_images(pipeline, repeated, seeds, batch_size=batch_size, **settings)  # type: ignore[arg-type]
            drawn = time.perf_counter()
            scores = {model.name: model.score(images, repeated).tolist() for model in reward_models}
            report.seconds["generate"] += drawn - began
            report.seconds["score"] += time.perf_counter() - drawn
            _add(totals, scores)
            if on_progress is not None:
                on_progress(len(images))
            for number, prompt in enumerate(group):
                own = slice(number * images_per_prompt, (number + 1) * images_per_prompt)
                candidates = {name: values[own] for name, values in scores.items()}
                ranking = rank_candidates(candidates, missing=missing)
                if ranking is None:
                    report.set_aside[prompt] = f"missing scores (rule {missing})"
                    continue
                sources = [_source(pipeline, picture_seed(prompt, s), steps, guidance) for s in seeds[own]]
                _count(report, ranking)
                yield PreferenceRow(
                    prompt=prompt,
                    image_bytes=[encode(image, "png", None) for image in images[own]],
                    preference=ranking.preference,
                    rank=ranking.rank,
                    scores=candidates,
                    sources=sources,
                )

    write_preferences(rows(), report.folder)
    store_score_ranges(report.folder)
    report.mean_scores = {name: total / count if count else float("nan") for name, (total, count) in totals.items()}
    if report.set_aside:
        log.warning("%d prompts were set aside: missing scores (rule %s)", len(report.set_aside), missing)
    return report


def _check(prompts: Sequence[str], images_per_prompt: int, reward_models: Sequence[RewardModel]) -> None:
    if images_per_prompt < 2:
        raise ConfigError(f"a preference needs at least two images per prompt, got {images_per_prompt}.")
    names = [model.name for model in reward_models]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"expected one or more reward models with different names, got {names}.")
    if not prompts:
        raise ConfigError("expected prompts, got none.")
    if len(set(prompts)) < len(prompts):
        again = next(prompt for index, prompt in enumerate(prompts) if prompt in prompts[:index])
        raise ConfigError(f"each prompt may come once, got {again!r} again; remove the duplicate.")


def _source(pipeline: Any, seed: int, steps: int, guidance: float) -> dict[str, Any]:
    return {
        "model": public_name(pipeline.config.get("_name_or_path") or type(pipeline).__name__),
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "scheduler": type(pipeline.scheduler).__name__,
    }


def _add(totals: dict[str, list[Any]], scores: dict[str, list[float]]) -> None:
    for name, values in scores.items():
        present = [value for value in values if value == value]  # NaN is not equal to itself
        totals[name][0] += sum(present)
        totals[name][1] += len(present)


def _count(report: BuildReport, ranking: Ranking) -> None:
    report.rows += 1
    report.images += len(ranking.rank)
    report.ties += ranking.rank.count(1) > 1
    report.all_tied += ranking.rank.count(1) == len(ranking.rank)

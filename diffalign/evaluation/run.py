"""`diffalign evaluate`: from names of models and a list of prompts to a report."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from reward_models import PairwiseRewardModel, RewardModel, RewardModelError, load_reward_model

from ..errors import ConfigError
from ..pipelines import load_pipeline
from .appearance import load_embedding
from .compare import Comparison, check_inputs, compare_judged
from .graders import Grader
from .models import BASE, ModelSpec, locate, parse_models, switched_on
from .panel import Judged, Panel
from .pictures import Picture, SamplingSettings, draw, path_identity, pipeline_identity
from .prompts import read_prompt_set
from .report import ModelResult, write_evaluation
from .roles import read_training


def evaluate(
    model: str,
    aligned: str | Path | ModelSpec | Sequence[str | Path | ModelSpec],
    prompts: Sequence[str] | Path | str,
    *,
    output_dir: str | Path,
    seeds: int = 4,
    steps: int = 25,
    guidance: float | Sequence[float] = 5.0,
    reward_models: Sequence[str | RewardModel | PairwiseRewardModel] = ("shapes-strict", "shapes"),
    grader: Grader | None = None,
    trained_on: Sequence[str] | None = None,
    embedding: str = "pixels",
    num_prompts: int | None = None,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    method: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare a base model and aligned ones and write ``report.json``, ``report.html`` and ``grid.png``.

    Pictures and scores that an earlier call left in ``output_dir`` are used again where model, settings, prompt and
    scorer are equal, so a stopped evaluation continues.

    Args:
        model: the base: ``shapes``, a hub id or a folder.
        aligned: one model or several: folder of a LoRA or of a pipeline, or of the training run that made it; see
            :func:`diffalign.evaluation.models.parse_models` for names and negative guidance.
        prompts: a list, a file, or a set by name; see :func:`read_prompt_set`.
        output_dir: of the report; all pictures are kept under ``pictures/``, all scores under ``scores/``.
        seeds: pictures per prompt and model; seeds 0, 1, ...
        steps, batch_size, height, width: see :class:`SamplingSettings`.
        guidance: one scale, or several to sweep; each model is compared with the base at the same scale, and the first
            scale is the one the report is about.
        reward_models: names (:func:`reward_models.load_reward_model`) or ready models; the first picks the pictures.
        grader: answers the entries of a benchmark's prompt set.
        trained_on: scores that made the preferences, beside those that the training runs record.
        embedding: for diversity and drift: ``pixels``, ``clip`` or ``package.module:function``.
        num_prompts: use only so many prompts.
        dtype: precision of the weights: fp32, fp16 or bf16; fp16 on a GPU and fp32 elsewhere when None.
        device: where to draw; the GPU when there is one.
        method: name of the first model's method in the report; read from the training run when None.
        progress: show progress bars.

    Returns:
        The content of ``report.json``.

    Raises:
        ConfigError, DataError, CheckpointError: an input cannot be used. Nothing is drawn before all are checked,
            except that a LoRA meets its base only after the base's turn.
    """
    began = time.perf_counter()
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}.")
    models = parse_models(aligned)
    places = [locate(one, model) for one in models]
    found = read_prompt_set(prompts, limit=num_prompts)
    if grader is not None and found.items is None:
        raise ConfigError(f"{found.name} has no entries that {grader.name} could grade; give the benchmark's own file.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorers = _load_scorers(reward_models, device)
    check_inputs(found.prompts, range(seeds), [*scorers, *([grader] if grader else [])])
    output, numbers = Path(output_dir), list(range(seeds))
    panel = Panel(
        [prompt for prompt in found.prompts for _ in numbers],
        scorers,
        grader,
        [item for item in found.items for _ in numbers] if grader and found.items else None,
        load_embedding(embedding),
        output / "scores",
    )
    scales = [guidance] if isinstance(guidance, (int, float)) else list(guidance)
    if not scales or len(set(scales)) < len(scales) or not all(math.isfinite(scale) for scale in scales):
        raise ConfigError(f"expected one or more different guidance scales, got {scales}.")
    sampling = SamplingSettings(steps, scales[0], batch_size, height, width)
    dtype = dtype or ("fp16" if device.startswith("cuda") else "fp32")
    artist = _Artist(found.prompts, numbers, sampling, scales, output / "pictures", dtype, device, progress)

    pictures, identities, seconds = artist.draw_all(model, models, places)
    scored = time.perf_counter()
    judged = {key: panel.judge(files) for key, files in pictures.items()}
    results = []
    for one in models:
        training = read_training(one.path)
        if method is not None and one is models[0]:
            training = replace(training, method=method)
        known = training.trained_on if trained_on is None else (*(training.trained_on or ()), *trained_on)
        results.append(ModelResult(one, [], training, known, identities[one.name]))
        for scale in scales:
            sides = judged[BASE, scale], judged[one.name, scale]
            results[-1].sweep.append(_compare(found.prompts, numbers, *sides, panel, sampling, scale, found.tasks, one))
    seconds["score"] = time.perf_counter() - scored
    seconds["load"] = time.perf_counter() - began - sum(seconds.values())
    results[0].comparison.seconds = seconds
    extra = {"prompt_set": found.name}
    return write_evaluation(results, output, base_name=str(model), extra=extra)


@dataclass
class _Artist:
    """Draws the pictures of every model at every guidance scale, with as few loads as possible."""

    prompts: list[str]
    seeds: list[int]
    sampling: SamplingSettings
    scales: list[float]
    folder: Path
    dtype: str
    device: str
    progress: bool

    def draw_all(
        self, base: str, models: Sequence[ModelSpec], places: Sequence[tuple[str, Path | str]]
    ) -> tuple[dict[tuple[str, float], list[Picture]], dict[str, str | None], dict[str, float]]:
        """Pictures by (model, guidance), identities by model, seconds by stage."""
        pictures: dict[tuple[str, float], list[Picture]] = {}
        identities: dict[str, str | None] = {}
        seconds: dict[str, float] = {}

        def turn(pipeline: DiffusionPipeline, name: str, identity: str | None) -> None:
            began = time.perf_counter()
            identities[name] = identity
            for scale in self.scales:
                pictures[name, scale] = self._draw(pipeline, name, scale, identity)
            seconds[f"generate_{name}"] = time.perf_counter() - began

        with self._loaded(base) as pipeline:
            own = pipeline_identity(pipeline)
            turn(pipeline, BASE, own)
            for model, (kind, place) in zip(models, places, strict=True):
                if kind != "pipeline":
                    lora = place if isinstance(place, Path) else None
                    with switched_on(pipeline, model, lora):
                        turn(pipeline, model.name, _identity(own, model, lora))
        del pipeline  # two large models need not fit in memory together
        gc.collect()
        for model, (kind, place) in zip(models, places, strict=True):
            if kind == "pipeline":
                with self._loaded(place) as other:
                    own = pipeline_identity(other)
                    with switched_on(other, model, None):
                        turn(other, model.name, _identity(own, model, None))
                del other
                gc.collect()
        return pictures, identities, seconds

    @contextmanager
    def _loaded(self, name: str | Path) -> Iterator[DiffusionPipeline]:
        yield load_pipeline(name, dtype=self.dtype).to(self.device)

    def _draw(self, pipeline: DiffusionPipeline, name: str, scale: float, identity: str | None) -> list[Picture]:
        folder = self.folder / name if len(self.scales) == 1 else self.folder / name / f"guidance-{scale:g}"
        sampling = replace(self.sampling, guidance=scale)
        return draw(
            pipeline, self.prompts, self.seeds, sampling, folder, identity=identity, progress=self.progress
        )  # fmt: skip


def _compare(
    prompts: list[str],
    seeds: list[int],
    base: Judged,
    aligned: Judged,
    panel: Panel,
    sampling: SamplingSettings,
    scale: float,
    tasks: list[str] | None,
    model: ModelSpec,
) -> Comparison:
    sampling = replace(sampling, guidance=scale)
    return compare_judged(prompts, seeds, base, aligned, panel, sampling=sampling, tasks=tasks, name=model.name)


def _identity(own: str, model: ModelSpec, lora: Path | None) -> str | None:
    """Of a pipeline with what is switched on in it; None when a part is not on this disk."""
    parts: list[str | None] = [own]
    if lora is not None:
        parts.append(path_identity(lora))
    if model.negative is not None:
        parts += [path_identity(model.negative), f"alpha={model.alpha}", f"beta={model.beta}"]
    return None if None in parts else "+".join(part for part in parts if part)


def _load_scorers(
    names: Sequence[str | RewardModel | PairwiseRewardModel], device: str
) -> list[RewardModel | PairwiseRewardModel]:
    try:
        return [load_reward_model(name, device=device) for name in names]  # type: ignore[arg-type]
    except RewardModelError as error:
        raise ConfigError(str(error)) from error

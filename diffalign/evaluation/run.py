"""`diffalign evaluate`: from two names and a list of prompts to a report."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reward_models import RewardModel, RewardModelError, load_reward_model

from ..errors import ConfigError
from ..pipelines import load_pipeline
from .compare import SamplingSettings, compare, compare_pictures, draw
from .lora import find_weights
from .prompts import read_prompts
from .report import write_report


def evaluate(
    model: str,
    aligned: str | Path,
    prompts: Sequence[str] | Path | str,
    *,
    output_dir: str | Path,
    seeds: int = 4,
    steps: int = 25,
    guidance: float = 5.0,
    reward_models: Sequence[str | RewardModel] = ("shapes-strict", "shapes"),
    num_prompts: int | None = None,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    method: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare a base model and an aligned one and write ``report.json``, ``report.html`` and ``grid.png``.

    Args:
        model: the base: ``shapes``, a hub id or a folder.
        aligned: folder of a LoRA or of a pipeline, or of the training run that made it.
        prompts: a list, a file, or ``shapes:heldout`` / ``shapes:seen``; see :func:`read_prompts`.
        output_dir: of the report; all pictures are kept under ``pictures/``.
        seeds: pictures per prompt and model; seeds 0, 1, ...
        steps, guidance, batch_size, height, width: see :class:`SamplingSettings`.
        reward_models: names (:func:`reward_models.load_reward_model`) or ready models; the first picks the pictures.
        num_prompts: use only so many prompts.
        dtype: precision of the weights: fp32, fp16 or bf16; fp16 on a GPU and fp32 elsewhere when None.
        device: where to draw; the GPU when there is one.
        method: name in the report; read from the training run when None.
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
    kind, weights = find_weights(aligned)
    texts = read_prompts(prompts, limit=num_prompts)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    scorers = _load_scorers(reward_models, device)
    sampling = SamplingSettings(steps, guidance, batch_size, height, width)
    dtype = dtype or ("fp16" if device.startswith("cuda") else "fp32")
    output = Path(output_dir)
    pictures = output / "pictures"
    base = load_pipeline(model, dtype=dtype).to(device)
    loaded = time.perf_counter()
    numbers = list(range(seeds))
    if kind == "lora":
        comparison = compare(
            base, weights, texts, numbers, scorers, sampling=sampling, picture_folder=pictures, progress=progress
        )
    else:
        base_pictures = draw(base, texts, numbers, sampling, pictures / "base", progress=progress)
        middle = time.perf_counter()
        del base  # two large models need not fit in memory together
        gc.collect()
        other = load_pipeline(weights, dtype=dtype).to(device)
        aligned_pictures = draw(other, texts, numbers, sampling, pictures / "aligned", progress=progress)
        seconds = {"generate_base": middle - loaded, "generate_aligned": time.perf_counter() - middle}
        comparison = compare_pictures(
            texts, numbers, base_pictures, aligned_pictures, scorers, sampling=sampling, seconds=seconds
        )
    comparison.seconds = {"load": loaded - began, **comparison.seconds}
    name = method or _method_of(Path(aligned)) or "aligned"
    return write_report(comparison, output, method=name, base_name=str(model), aligned_name=str(aligned))


def _load_scorers(names: Sequence[str | RewardModel], device: str) -> list[RewardModel]:
    try:
        return [load_reward_model(name, device=device) for name in names]
    except RewardModelError as error:
        raise ConfigError(str(error)) from error


def _method_of(folder: Path) -> str | None:
    """The method that the training report beside the weights names."""
    for file in (folder / "training_report.json", folder.parent / "training_report.json"):
        if file.is_file():
            method = json.loads(file.read_text(encoding="utf-8")).get("method")
            return method if isinstance(method, str) else None
    return None

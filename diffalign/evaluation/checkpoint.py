"""The trained weights of a run's checkpoint, put into its base model for a while."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..pipelines import adapter_for
from .lora import remove_adapter

WEIGHTS_FILE = "trainable.safetensors"  # what a training run writes into checkpoint-NNNNNN
CONFIG_FILE = "training_config.json"


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a checkpoint folder of a training run."""
    return (Path(path) / WEIGHTS_FILE).is_file()


@contextmanager
def checkpoint_loaded(
    pipeline: DiffusionPipeline, folder: str | Path, adapter_name: str = "compared"
) -> Iterator[None]:
    """The denoiser as it was at a checkpoint inside the block; afterwards the pipeline is what it was.

    These are the trained weights themselves. Where a run keeps a moving average, its final weights are the average.

    Args:
        pipeline: the model the run started from.
        folder: ``checkpoint-NNNNNN`` of the run.
        adapter_name: peft's name of the adapter while it is there.

    Raises:
        CheckpointError: the folder is unreadable, or belongs to another architecture.
    """
    folder, denoiser = Path(folder), adapter_for(pipeline).denoiser
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read the checkpoint {folder}: {error}") from error
    if config.get("adapter") == "none":
        kept = _copy(denoiser, tensors, folder)
        try:
            yield
        finally:
            _copy(denoiser, kept, folder)
        return
    pipe: Any = pipeline
    targets = config.get("lora_targets") or list(adapter_for(pipeline).default_lora_targets)
    rank = config["lora_rank"]
    alpha = config["lora_alpha"] if config.get("lora_alpha") is not None else rank
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, use_dora=config["adapter"] == "dora")
    try:
        try:
            denoiser.add_adapter(lora, adapter_name=adapter_name)
        except ValueError as error:  # peft's word for targets that the network does not have
            raise _misfit(folder, pipeline, str(error).splitlines()[0]) from error
        own = {name.replace(".default.", f".{adapter_name}."): tensor for name, tensor in tensors.items()}
        expected = {name for name, _ in denoiser.named_parameters() if f".{adapter_name}." in name}
        if own.keys() != expected:
            raise _misfit(folder, pipeline, f"they differ in {sorted(own.keys() ^ expected)[:2]}")
        _copy(denoiser, own, folder)
        pipe.set_adapters(adapter_name)
        yield
    finally:
        remove_adapter(pipeline, adapter_name)


def _copy(denoiser: nn.Module, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Overwrite parameters by name; returns what they were."""
    named = dict(denoiser.named_parameters())
    wrong = [name for name, tensor in tensors.items() if name not in named or named[name].shape != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"the checkpoint {folder} does not fit {type(denoiser).__name__}: no such weights as {wrong[0]} "
            f"{tuple(tensors[wrong[0]].shape)}. Name the base model it was trained on."
        )
    kept = {}
    with torch.no_grad():
        for name, tensor in tensors.items():
            kept[name] = named[name].detach().clone()
            named[name].copy_(tensor)
    return kept


def _misfit(folder: Path, pipeline: DiffusionPipeline, reason: str) -> CheckpointError:
    kind = type(pipeline).__name__
    return CheckpointError(f"the checkpoint {folder} does not fit this {kind}: {reason}. Name its base model.")

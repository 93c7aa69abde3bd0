"""A LoRA switched on for a while, with proof that all of it arrived."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import CheckpointError
from ..pipelines import adapter_for

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name diffusers saves and looks for


def find_weights(path: str | Path) -> tuple[str, Path]:
    """What an aligned model's folder holds.

    Args:
        path: a LoRA folder or file, a pipeline folder, or the folder of a training run (its ``final`` is taken).

    Returns:
        ``("lora", file)`` or ``("pipeline", folder)``.

    Raises:
        CheckpointError: nothing there, or nothing that can be loaded.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return "lora", path
    if not path.is_dir():
        raise CheckpointError(f"expected the folder of an aligned model, but {path} does not exist; check the path.")
    for folder in (path, path / "final"):
        if (folder / LORA_FILE).is_file():
            return "lora", folder / LORA_FILE
        if (folder / "model_index.json").is_file():
            return "pipeline", folder
    held = ", ".join(sorted(child.name for child in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} holds neither {LORA_FILE} (a LoRA) nor model_index.json (a pipeline), but {held}; "
        "give the folder that trainer.save_model() wrote."
    )


@contextmanager
def lora_loaded(pipeline: DiffusionPipeline, file: str | Path, adapter_name: str = "aligned") -> Iterator[None]:
    """Switch a LoRA on inside the block; afterwards the pipeline is what it was.

    Raises:
        CheckpointError: the file is unreadable, or made for another architecture. diffusers only logs when part of a
            file finds no module, and the base would then be compared with itself.
    """
    file = Path(file)
    pipe: Any = pipeline
    denoiser: nn.Module = adapter_for(pipeline).denoiser
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
        expected = sum("lora_A" in name or "lora_down" in name or ".lora.down" in name for name in names)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read the LoRA {file}: {error}") from error
    if expected == 0:
        raise CheckpointError(f"{file} holds no LoRA weights; expected a file written by trainer.save_model().")
    before = _active(pipe)
    try:
        try:
            with _quiet_diffusers():  # it warns of every text encoder that the LoRA leaves alone
                pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter_name)
        except (RuntimeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(_misfit(file, pipeline, _cause(error))) from error
        arrived = sum(_layers(module, adapter_name) for module in _modules(pipe))
        if arrived != expected or not _layers(denoiser, adapter_name):
            raise CheckpointError(_misfit(file, pipeline, f"{arrived} of its {expected} layers found their place"))
        pipe.set_adapters(adapter_name)
        yield
    finally:
        remove_adapter(pipeline, adapter_name)
        if before:
            pipe.set_adapters(before)


def remove_adapter(pipeline: DiffusionPipeline, adapter_name: str) -> None:
    """Take an adapter out. With the last one go peft's wrappers, which rename and slow down the layers inside them."""
    pipe: Any = pipeline
    names = {name for module in _modules(pipe) for name in getattr(module, "peft_config", {})}
    if names - {adapter_name}:
        if adapter_name in names:
            pipe.delete_adapters(adapter_name)
    elif any(isinstance(layer, BaseTunerLayer) for module in _modules(pipe) for layer in module.modules()):
        pipe.unload_lora_weights()


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(diffusers_logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _cause(error: Exception) -> str:
    """The one line of torch's long message that tells something."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return next((line for line in lines if "mismatch" in line), lines[0]).rstrip(".")


def _active(pipe: Any) -> list[str]:
    return list(pipe.get_active_adapters()) if getattr(adapter_for(pipe).denoiser, "peft_config", None) else []


def _modules(pipe: Any) -> list[nn.Module]:
    return [component for component in pipe.components.values() if isinstance(component, nn.Module)]


def _layers(module: nn.Module, adapter_name: str) -> int:
    """How many layers of ``module`` carry the adapter."""
    return sum(adapter_name in child for name, child in module.named_modules() if name.endswith("lora_A"))


def _misfit(file: Path, pipeline: DiffusionPipeline, reason: str) -> str:
    model = pipeline.config.get("_name_or_path") or type(pipeline).__name__
    kind = type(pipeline).__name__
    return f"the LoRA {file} does not fit {model} ({kind}): {reason}. Name the base model it was trained on."

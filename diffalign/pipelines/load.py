"""Load a pipeline by whatever name a user has for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from ..errors import ConfigError
from .hub import HTTP_ERROR, hub_problem

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EMBEDDED = "shapes"


def load_pipeline(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    config: str | Path | None = None,
) -> DiffusionPipeline:
    """A ready diffusers pipeline, on the CPU.

    SDXL's invisible watermark is switched off: it would be trained into the model and measured by reward models.

    Args:
        name_or_path: ``shapes`` (the embedded default), a hub id, a pipeline folder, or a single ``.safetensors``
            checkpoint of SD or SDXL in the original layout.
        dtype: precision of all weights: a torch dtype, ``fp32``, ``fp16`` or ``bf16``; None means fp32.
        revision: branch, tag or commit of a hub repository.
        variant: file variant of a folder or hub repository, for example ``fp16``.
        config: for a single file, the folder or hub id of a pipeline with the same configuration; None takes the
            original model's from the hub.

    Raises:
        ConfigError: there is no such model, it cannot be read, or an option does not apply to it.
    """
    name = str(name_or_path)
    wanted = _dtype(dtype)
    if revision is not None and (name == EMBEDDED or Path(name).exists()):
        raise ConfigError(f"{name} is no model on the hub, so revision={revision!r} means nothing. Leave it out.")
    if variant is not None and (name == EMBEDDED or _is_checkpoint(name)):
        raise ConfigError(f"{name} has no variants, so variant={variant!r} means nothing. Leave it out.")
    if config is not None and not _is_checkpoint(name):
        raise ConfigError(f"config belongs to single-file checkpoints; {name} is loaded with its own configuration.")
    if name == EMBEDDED:
        from ..shapes import (
            pipeline_folder,  # late: the embedded default imports nothing of the library but has weights
        )

        name = str(pipeline_folder())
    if _is_checkpoint(name):
        pipeline = _load_single_file(Path(name), wanted, None if config is None else str(config))
    else:
        pipeline = _load_folder_or_hub(name, wanted, revision, variant)
    if getattr(pipeline, "watermark", None) is not None:
        pipeline.watermark = None
    return pipeline


def _load_folder_or_hub(name: str, dtype: torch.dtype, revision: str | None, variant: str | None) -> DiffusionPipeline:
    folder = Path(name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{name} is a folder without model_index.json, so no diffusers pipeline. {_near(folder)}")
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ConfigError(
            f"there is no folder {name}, and it is no hub id (owner/name) either. Give a pipeline folder, a "
            f".safetensors file, a hub id or '{EMBEDDED}'."
        )
    try:
        return DiffusionPipeline.from_pretrained(
            name, dtype=dtype, revision=revision, variant=variant, **_left_out(folder)
        )
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError, HTTP_ERROR) as error:
        where = "folder" if folder.is_dir() else "model on the hub (a local folder of that name does not exist)"
        wanted = "".join(f", {k} {v}" for k, v in (("revision", revision), ("variant", variant)) if v)
        reason = hub_problem(error, name, revision) or _first_line(error)
        raise ConfigError(f"cannot load the {where} {name}{wanted}: {reason}") from error


def _left_out(folder: Path) -> dict[str, None]:
    """Encoders that a folder was saved without (SD3 without T5): diffusers wants to be told so once more."""
    if not folder.is_dir():
        return {}
    index = json.loads((folder / "model_index.json").read_text())
    names = (
        name for name, part in index.items() if name.startswith(("text_encoder", "tokenizer")) and part == [None] * 2
    )
    return dict.fromkeys(names)


def _load_single_file(path: Path, dtype: torch.dtype, config: str | None) -> DiffusionPipeline:
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"{path} can run code when it is opened. Convert it to .safetensors, or load the original repository."
        )
    if not path.is_file():
        raise ConfigError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except SafetensorError as error:
        raise ConfigError(f"{path} is no usable safetensors file: {error}") from error
    cls = _class_of(names, path)
    try:
        return cls.from_single_file(str(path), dtype=dtype, config=config)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        advice = "" if config else " Without network, pass config=<folder of a pipeline of the same kind>."
        raise ConfigError(f"cannot load {path} as {cls.__name__}: {_first_line(error)}{advice}") from error


def _class_of(names: set[str], path: Path) -> type[DiffusionPipeline]:
    """SD or SDXL, by the names under which the original layouts keep their text encoders."""
    if any(name.startswith("conditioner.embedders.1.") for name in names):
        return StableDiffusionXLPipeline
    if any(name.startswith("cond_stage_model.") for name in names):
        return StableDiffusionPipeline
    if any(".lora_" in name or "lora_unet_" in name for name in names):
        raise ConfigError(f"{path} is a LoRA. Load its base model, then pipeline.load_lora_weights({str(path)!r}).")
    for family, block in (("SD3", "joint_blocks.0."), ("FLUX", "double_blocks.0.")):
        if any(block in name for name in names):
            raise ConfigError(
                f"{path} is an {family} checkpoint in the original layout, which lacks at least the T5. Load {family} "
                "from a pipeline folder or hub id; a fine-tuned transformer can replace the folder's own there."
            )
    raise ConfigError(f"{path} is no SD or SDXL checkpoint in the original layout (no text encoder found in it).")


def _is_checkpoint(name: str) -> bool:
    return Path(name).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin") and not Path(name).is_dir()


def _near(folder: Path) -> str:
    inside = sorted(child.parent.name for child in folder.glob("*/model_index.json"))
    return f"Did you mean {folder / inside[0]}?" if inside else "Give the folder that holds model_index.json."


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
        return DTYPES[dtype]
    return torch.float32 if dtype is None else dtype


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

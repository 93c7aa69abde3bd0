"""A negative model in one folder, with the settings it is meant to be used with.

negative.json                          settings; what makes the folder readable by negative_guidance
pytorch_lora_weights.safetensors       the negative LoRA, which any program can load ...
positive/pytorch_lora_weights.safetensors   ... and the positive one, where alpha mixes it in
unet/ (or transformer/)                or, merged, the network itself
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline

from ..errors import CheckpointError, ConfigError
from ..evaluation.lora import LORA_FILE
from ..pipelines import adapter_for

if TYPE_CHECKING:
    from .negative import Model

EXPORT_FILE = "negative.json"


@dataclass(frozen=True)
class Exported:
    """Settings of :func:`negative_guidance`, which documents them."""

    alpha: float = 0.0
    beta: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    embedding: str = "default"


def export_negative(
    pipeline: DiffusionPipeline,
    folder: str | Path,
    negative: Model,
    positive: Model | None = None,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    embedding: str = "default",
    merged: bool = False,
) -> Path:
    """Write a negative model that ``negative_guidance(pipeline, folder)`` reads back with these settings.

    Args:
        pipeline: holds the base.
        folder: must not exist yet.
        negative, positive, alpha, beta, rescale, interval, embedding: as in :func:`negative_guidance`.
        merged: write the network with the mixed weights in place of LoRAs: larger, but free of the positive model, and
            good for whole models and fractions of a DoRA.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder exists, a whole model without ``merged``, or a setting out of range.
        CheckpointError: a model that cannot be read, or a disk that is full.
    """
    from .negative import _lora_file, check, negative_network

    settings = Exported(alpha, beta, rescale, interval, embedding)
    check(settings)
    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists already; choose another folder or remove it.")
    loras = {"": negative} if positive is None else {"": negative, "positive": positive}
    files = {place: _lora_file(model) for place, model in loras.items()}
    if not merged and None in files.values():
        raise ConfigError("only LoRAs can be exported as they are; write a whole model with merged=True.")
    if not merged and alpha and positive is None:
        raise ConfigError("alpha mixes in a positive model; give positive=... so that it can be written too.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            staging = Path(made) / "new"
            staging.mkdir()
            said: dict[str, Any] = asdict(settings)
            if merged:
                network = negative_network(pipeline, negative, positive, settings)
                network.save_pretrained(staging / adapter_for(pipeline).denoiser_name)
                said |= {"alpha": 0.0, "beta": 1.0}
            else:
                for place, file in files.items():
                    assert file is not None
                    (staging / place).mkdir(exist_ok=True)
                    shutil.copyfile(file, staging / place / LORA_FILE)
            kind = "network" if merged else "lora"
            (staging / EXPORT_FILE).write_text(json.dumps({"version": 1, "kind": kind, **said}, indent=2))
            staging.rename(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {error}. Free space or choose another folder.") from error
    return folder


def read_export(folder: Path) -> tuple[Exported, Path, Path | None]:
    """Settings, negative and positive model of a folder that :func:`export_negative` wrote.

    Raises:
        CheckpointError: the folder was written by another version, or is damaged.
    """
    names = {item.name for item in fields(Exported)}
    try:
        said = json.loads((folder / EXPORT_FILE).read_text())
        version, kind = said.pop("version"), said.pop("kind")
        if version != 1 or kind not in ("lora", "network") or said.keys() != names:
            raise ValueError(f"version {version}, kind {kind}, settings {', '.join(sorted(said))}")
        settings = Exported(**said | {"interval": tuple(said["interval"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / EXPORT_FILE} is no description of a negative model that this version reads ({error}). Write it "
            "again with export_negative."
        ) from error
    if kind == "network":
        return settings, folder, None
    positive = folder / "positive"
    return settings, folder / LORA_FILE, positive if positive.is_dir() else None

"""What can be compared: a name for each model, and the pipelines that are kept loaded."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError
from ..evaluation.checkpoint import WEIGHTS_FILE, checkpoint_loaded, is_checkpoint
from ..evaluation.lora import find_weights, lora_loaded
from ..pipelines import load_pipeline

NEGATIVE = "npo:"
_LABEL = re.compile(r"([^=/\\]{1,40})=(.+)")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_HASHED_BYTES = 2**20  # of the end of a weights file; training changes every matrix, so any part of it tells


@dataclass(frozen=True)
class ModelSpec:
    """One model of a comparison.

    Args:
        label: short, unique, what people read.
        kind: a whole ``pipeline``; or on a base: a ``lora``, a ``checkpoint`` of a run, or a ``negative`` model that
            guides the base away from what it draws.
        source: hub id, folder or file of the pipeline or of the weights.
        base: pipeline the weights sit on; ``source`` itself for a pipeline.
        revision: hash of the weights; None for a hub id.
    """

    label: str
    kind: Literal["pipeline", "lora", "checkpoint", "negative"]
    source: str
    base: str
    revision: str | None = None

    @property
    def identity(self) -> str:
        """The name that votes carry."""
        if self.kind == "pipeline":
            return self.source
        return f"{self.base} + {NEGATIVE if self.kind == 'negative' else ''}{self.source}"


def parse_model(text: str, base: str = "shapes") -> ModelSpec:
    """A model from what a person types.

    Args:
        text: ``[label=]NAME``, where NAME is ``shapes``, a hub id, a folder or file of a pipeline or LoRA, a training
            run or one of its checkpoints; ``npo:NAME`` guides the base with it as the negative model.
        base: of LoRAs and checkpoints whose run does not say what it started from.

    Raises:
        ConfigError, CheckpointError: there is no such thing, or it could run code when opened.
    """
    text = text.strip()
    match = _LABEL.fullmatch(text)
    label, name = (match[1].strip(), match[2].strip()) if match else ("", text)
    negative = name.startswith(NEGATIVE)
    name = name.removeprefix(NEGATIVE)
    if not name:
        raise ConfigError("expected a model: shapes, a hub id, or the path of a pipeline, a LoRA or a training run.")
    path = Path(name)
    label = label or (NEGATIVE if negative else "") + _short(path)
    if not path.exists():
        if negative or name.startswith((".", "/", "~")):
            raise CheckpointError(f"there is no file or folder {name}; check the path.")
        return ModelSpec(label, "pipeline", name, name)
    if negative:  # negative_guidance reads runs, LoRAs, pipelines and its own exports, and refuses the rest
        return ModelSpec(label, "negative", str(path), _base_of(path) or base, _fingerprint(path))
    if is_checkpoint(path):
        kind, weights = "checkpoint", path
    elif path.suffix == ".safetensors" and not _is_lora(path):
        kind, weights = "pipeline", path
    elif path.is_file() and path.suffix != ".safetensors":
        raise ConfigError(f"{path.name} is no safetensors file; other formats can run code when they are opened.")
    else:
        kind, weights = find_weights(path)
    revision = _fingerprint(weights / WEIGHTS_FILE if kind == "checkpoint" else weights)
    if kind == "pipeline":
        _refuse_pickles(weights)
        return ModelSpec(label, "pipeline", str(weights), str(weights), revision)
    return ModelSpec(label, "lora" if kind == "lora" else "checkpoint", str(weights), _base_of(path) or base, revision)


class ModelPool:
    """Loaded pipelines, the most recently used first; LoRAs are switched on in the one base they share.

    Not for several threads at once: the engine's worker is its only user.

    Args:
        device: where models run; None takes the GPU when there is one.
        dtype: precision of the weights; None means fp16 on a GPU and fp32 elsewhere.
        keep_gb: weights kept loaded at most, in GB; the pipeline in use always stays.
    """

    def __init__(self, *, device: str | None = None, dtype: str | None = None, keep_gb: float = 12.0) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype or ("fp16" if self.device.startswith("cuda") else "fp32")
        self.keep_bytes = keep_gb * 2**30
        self._loaded: OrderedDict[str, DiffusionPipeline] = OrderedDict()

    @property
    def loaded(self) -> list[str]:
        """Names of the pipelines in memory, the least recently used first."""
        return list(self._loaded)

    def pipeline(self, name: str) -> DiffusionPipeline:
        """The pipeline of that name, loaded when it is not."""
        if name not in self._loaded:
            loaded: Any = load_pipeline(name, dtype=self.dtype)
            self._loaded[name] = loaded.to(self.device)
        self._loaded.move_to_end(name)
        while len(self._loaded) > 1 and sum(map(_bytes, self._loaded.values())) > self.keep_bytes:
            self._loaded.popitem(last=False)
        return self._loaded[name]

    @contextmanager
    def ready(self, spec: ModelSpec) -> Iterator[DiffusionPipeline]:
        """The model, ready to draw inside the block; the base is what it was afterwards.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded, or does not fit its base.
        """
        pipeline = self.pipeline(spec.base)
        with ExitStack() as stack:
            if spec.kind == "lora":
                stack.enter_context(lora_loaded(pipeline, spec.source))
            elif spec.kind == "checkpoint":
                stack.enter_context(checkpoint_loaded(pipeline, spec.source))
            elif spec.kind == "negative":
                from ..guidance import negative_guidance

                stack.enter_context(negative_guidance(pipeline, spec.source))
            yield pipeline


def unique_labels(specs: list[ModelSpec]) -> None:
    """Refuse two models of one label: a vote could not say which it was for."""
    seen: set[str] = set()
    for spec in specs:
        if spec.label in seen:
            raise ConfigError(f"two models are called {spec.label!r}; name one of them: label=NAME.")
        seen.add(spec.label)


def _short(path: Path) -> str:
    """The telling part of a path: ``run/final`` and ``run/checkpoint-000100`` need their run's name."""
    if path.name == "final" or path.name.startswith("checkpoint-"):
        return f"{path.parent.name} {path.name.removeprefix('checkpoint-').lstrip('0')}".strip()
    return path.stem if path.suffix == ".safetensors" else path.name


def _base_of(path: Path) -> str | None:
    """The model that the training run of these weights started from, where it says so."""
    for folder in (path, path.parent, path.parent.parent):
        file = folder / "config.yaml"
        if file.is_file():
            settings = yaml.safe_load(file.read_text(encoding="utf-8"))
            model = settings.get("model") if isinstance(settings, dict) else None
            return model if isinstance(model, str) else None
    return None


def _is_lora(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as tensors:
            return any("lora" in name for name in tensors.keys())  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def _refuse_pickles(weights: Path) -> None:
    """A local pipeline must be safetensors throughout."""
    pickles = [file for file in weights.rglob("*") if file.suffix in _PICKLES] if weights.is_dir() else []
    if pickles:
        raise ConfigError(
            f"{weights} holds {pickles[0].name}, which can run code when opened; save the pipeline as safetensors."
        )


def _fingerprint(weights: Path) -> str:
    """12 hex digits that change when the weights do: sizes and ends of the files, so that large ones cost nothing."""
    weights = weights / "final" if (weights / "final").is_dir() else weights
    files = [weights] if weights.is_file() else sorted(weights.rglob("*.safetensors"))
    digest = hashlib.blake2b(digest_size=6)
    for file in files:
        size = file.stat().st_size
        with file.open("rb") as stream:
            stream.seek(max(0, size - _HASHED_BYTES))
            digest.update(json.dumps([file.name, size]).encode() + stream.read())
    return digest.hexdigest()


def _bytes(pipeline: DiffusionPipeline) -> int:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())

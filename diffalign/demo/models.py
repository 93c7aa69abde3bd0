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
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, ConfigError
from ..evaluation.checkpoint import WEIGHTS_FILE, checkpoint_loaded, is_checkpoint
from ..evaluation.lora import find_weights, lora_loaded
from ..evaluation.models import is_hub_id
from ..evaluation.roles import read_yaml
from ..pipelines import load_pipeline
from ..pipelines.load import EMBEDDED
from ..shapes import pipeline_folder

NEGATIVE = "npo:"
_LABEL = re.compile(r"([^=/\\]{1,40})=(.+)")
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
KEPT_LORAS = 4  # loaded in a base at once
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
    match = None if Path(text).expanduser().exists() else _LABEL.fullmatch(text)  # folders may have = in their names
    label, name = (match[1].strip(), match[2].strip()) if match else ("", text)
    negative = name.startswith(NEGATIVE)
    name = name.removeprefix(NEGATIVE)
    if not name:
        raise ConfigError("expected a model: shapes, a hub id, or the path of a pipeline, a LoRA or a training run.")
    path = Path(name).expanduser()
    label = label or (NEGATIVE if negative else "") + _short(path)
    if name == EMBEDDED and not negative:  # whatever lies under that name in the working folder
        return ModelSpec(label, "pipeline", name, name, _fingerprint(pipeline_folder()))
    if not path.exists():
        if negative or not is_hub_id(name):
            raise CheckpointError(f"there is no file or folder {name}; check the path.")
        return ModelSpec(label, "pipeline", name, name)
    if negative:  # negative_guidance reads runs, LoRAs, pipelines and its own exports, and refuses the rest
        return ModelSpec(label, "negative", str(path), base_of(path) or base, _fingerprint(path))
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
    return ModelSpec(label, "lora" if kind == "lora" else "checkpoint", str(weights), base_of(path) or base, revision)


class _Loras:
    """LoRAs of one loaded pipeline. They stay loaded, all switched off: finding every layer again takes seconds."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._names: dict[tuple[str, str | None], str] = {}
        self._loaded = ExitStack()

    @contextmanager
    def on(self, spec: ModelSpec) -> Iterator[None]:
        """The LoRA acts inside the block, and no other."""
        key = spec.source, spec.revision
        try:
            if key not in self._names:
                if len(self._names) >= KEPT_LORAS:
                    self.clear()
                name = f"compared{len(self._names)}"
                self._loaded.enter_context(lora_loaded(self.pipeline, spec.source, name))
                self._names[key] = name
            self.pipeline.set_adapters(self._names[key])
            self.pipeline.enable_lora()
            yield
        finally:
            if self._names:
                self.pipeline.disable_lora()

    def clear(self) -> None:
        """Leave the pipeline as it was loaded."""
        self._names.clear()
        self._loaded.close()


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
        self._loras: dict[str, _Loras] = {}

    @property
    def loaded(self) -> list[str]:
        """Names of the pipelines in memory, the least recently used first."""
        return list(self._loaded)

    def pipeline(self, name: str) -> DiffusionPipeline:
        """The pipeline of that name, loaded when it is not."""
        if name not in self._loaded:
            loaded: Any = load_pipeline(name, dtype=self.dtype)
            self._loaded[name] = loaded.to(self.device)
            self._loras[name] = _Loras(self._loaded[name])
        self._loaded.move_to_end(name)
        while len(self._loaded) > 1 and sum(map(_bytes, self._loaded.values())) > self.keep_bytes:
            self._loras.pop(self._loaded.popitem(last=False)[0])
        return self._loaded[name]

    @contextmanager
    def ready(self, spec: ModelSpec) -> Iterator[DiffusionPipeline]:
        """The model, ready to draw inside the block; the base is what it was afterwards.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded, or does not fit its base.
        """
        pipeline = self.pipeline(spec.base)
        loras = self._loras[spec.base]
        with ExitStack() as stack:
            if spec.kind == "lora":
                stack.enter_context(loras.on(spec))
            elif spec.kind == "checkpoint":
                loras.clear()  # a checkpoint of all weights is copied into layers by their plain names
                stack.enter_context(checkpoint_loaded(pipeline, spec.source))
            elif spec.kind == "negative":
                loras.clear()
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


def base_of(path: Path) -> str | None:
    """The model that the training run of these weights started from, where it says so."""
    for folder in (path, path.parent, path.parent.parent):
        if (file := folder / "config.yaml").is_file():
            model = read_yaml(file).get("model")
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

"""Which models are compared: their names, their weights, and how each is switched on for its turn."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from diffusers import DiffusionPipeline

from ..errors import CheckpointError, ConfigError
from ..pipelines.load import EMBEDDED
from .lora import find_weights, lora_loaded

_NAME = re.compile(r"[\w.+-]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OPTIONS = ("negative", "alpha", "beta")
BASE = "base"
_TAKEN = {BASE: "is what the base model is called"} | dict.fromkeys(("prompt", "seed"), "is a key of pairs.jsonl")


@dataclass(frozen=True)
class ModelSpec:
    """One aligned model.

    Args:
        path: a LoRA, a pipeline, the folder of a training run, or the base itself.
        name: in reports, and of its folder of pictures.
        negative: a negative-preference model that predicts the unconditional branch of guidance; see
            :mod:`diffalign.guidance`.
        alpha, beta: its mixing weights; None takes the guidance's own defaults.
    """

    path: str
    name: str = "aligned"
    negative: str | None = None
    alpha: float | None = None
    beta: float | None = None

    def __str__(self) -> str:
        options = [f"{key}={getattr(self, key)}" for key in _OPTIONS if getattr(self, key) is not None]
        return self.path + ("?" + "&".join(options) if options else "")


def parse_models(texts: str | Path | ModelSpec | Sequence[str | Path | ModelSpec]) -> list[ModelSpec]:
    """Read ``[name=]path[?negative=path&alpha=number&beta=number]`` for each model.

    A single model without a name is called ``aligned``; of several each is called after its run's folder.

    Raises:
        ConfigError: no model, an unknown option, or two models of one name.
    """
    given = [texts] if isinstance(texts, (str, Path, ModelSpec)) else list(texts)
    if not given:
        raise ConfigError("expected a model to evaluate, got none; give the folder of a training run.")
    models = [text if isinstance(text, ModelSpec) else _parse(str(text), single=len(given) == 1) for text in given]
    names = [model.name for model in models]
    for name in names:
        if name in _TAKEN or names.count(name) > 1 or not _NAME.fullmatch(name) or not name.strip("."):
            reason = _TAKEN.get(name, "must be a plain word, and used once")
            raise ConfigError(f"the model name {name!r} {reason}; name models as NAME=PATH.")
    return models


def locate(model: ModelSpec, base: str) -> tuple[str, Path | str]:
    """``("base", base)``, ``("lora", file)`` or ``("pipeline", folder or hub id)``.

    Raises:
        CheckpointError: there is nothing that can be loaded.
    """
    if model.negative is not None and not Path(model.negative).exists():
        raise CheckpointError(
            f"the negative model {model.negative} of {model.name} does not exist; give a path, to which a model from "
            "the hub must be downloaded first."
        )
    if model.path == base:
        return BASE, base
    if model.path == EMBEDDED or is_hub_id(model.path):
        return "pipeline", model.path
    return find_weights(model.path)


@contextmanager
def switched_on(pipeline: DiffusionPipeline, model: ModelSpec, lora: Path | None) -> Iterator[None]:
    """The model's LoRA and its negative guidance inside the block; afterwards the pipeline is what it was."""
    with ExitStack() as stack:
        if lora is not None:
            stack.enter_context(lora_loaded(pipeline, lora))
        if model.negative is not None:
            from ..guidance import negative_guidance  # late: only those who use it pay for it

            mixing: dict[str, Any] = {"alpha": model.alpha, "beta": model.beta}
            mixing = {key: value for key, value in mixing.items() if value is not None}
            stack.enter_context(negative_guidance(pipeline, model.negative, **mixing))
        yield


def _parse(text: str, *, single: bool) -> ModelSpec:
    name, path = "", text
    if not Path(text).exists():  # folders may have = in their names
        before, equals, after = text.partition("=")
        if equals and _NAME.fullmatch(before):
            name, path = before, after
    path, _, query = path.partition("?")
    options: dict[str, str] = {}
    for key, value in parse_qsl(query.replace("+", "%2B"), keep_blank_values=True):
        if key not in _OPTIONS or key in options or not value:
            raise ConfigError(f"{text!r}: expected each of {', '.join(_OPTIONS)} at most once and with a value.")
        options[key] = value
    if query and not options:
        raise ConfigError(f"{text!r}: expected NAME=PATH?negative=PATH&alpha=NUMBER&beta=NUMBER.")
    if options and "negative" not in options:
        raise ConfigError(f"{text!r}: alpha and beta belong to negative=PATH, which is missing.")
    numbers = {key: _number(options[key], key, text) for key in ("alpha", "beta") if key in options}
    if not name:
        name = "aligned" if single else _called(Path(path))
    return ModelSpec(path, name, options.get("negative"), **numbers)


def _number(text: str, key: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{where!r}: {key} must be a number, got {text!r}.") from None


def _called(path: Path) -> str:
    """The run's folder: not the weights file, not ``final``."""
    if path.suffix == ".safetensors":
        path = path.parent
    if path.name == "final":
        path = path.parent
    return re.sub(r"[^\w.+-]", "-", path.name) or "aligned"


def is_hub_id(path: str) -> bool:
    """Whether ``a/b`` is no path: a missing run beside others is then reported as such."""
    here = Path(path).exists() or Path(path).parts[:1] in ((".",), ("..",)) or Path(path).parent.is_dir()
    return bool(_HUB_ID.fullmatch(path)) and not here

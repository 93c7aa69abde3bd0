"""Another round: an aligned checkpoint among the pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .config import GenerationConfig, PipelineSpec, read_yaml

NAME = "policy"


def with_policy(config: GenerationConfig, run: Path) -> GenerationConfig:
    """Add the model that a training run made as one more pipeline, with the sampling settings of the first.

    Args:
        config: of the round.
        run: folder of the run, of its weights, or a file of a LoRA.

    Raises:
        CheckpointError: the folder holds no weights.
        ConfigError: there is a pipeline of that name already.
    """
    from ..evaluation.lora import find_weights  # late: evaluation draws with this package

    if NAME in config.artists:
        raise ConfigError(f"there is a pipeline named {NAME!r} already; rename it, or leave --policy out.")
    kind, weights = find_weights(run)
    first = next(iter(config.artists.values()))
    changes: dict[str, Any] = {"name": NAME, "license": None}
    if kind == "lora":
        changes |= {"model": base_of(run) or first.model, "lora": str(run), "lora_scale": 1.0}
    else:
        changes |= {"model": str(weights), "lora": None}
    if changes["model"] != first.model:
        changes |= {"revision": None, "variant": None, "config": None}  # they name parts of the first model
    spec = PipelineSpec(**(first.model_dump() | changes))
    return GenerationConfig(**(config.model_dump() | {"pipelines": [*config.pipelines, spec]}))


def base_of(run: Path) -> str | None:
    """The base model that a training run names in its settings."""
    for folder in (run, run.parent):
        file = folder / "config.yaml"
        if file.is_file():
            model = read_yaml(file).get("model")
            return model if isinstance(model, str) else None
    return None

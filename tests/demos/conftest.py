"""Real tiny models on the disk, and engines that draw with them in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from diffalign.demo.engine import Ask, Engine, Limits
from diffalign.demo.models import ModelPool, parse_model
from diffalign.pipelines import adapter_for
from diffalign.pipelines.export import save_lora
from tests.tiny import tiny_sd, tiny_sdxl


def red(images, prompts):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


def only_cats(images, prompts):
    return [1.0 if "cat" in prompt else None for prompt in prompts]


def lora(pipeline: Any, folder: Path) -> Path:
    pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    save_lora(adapter_for(pipeline), folder / "final")
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> dict[str, Path]:
    """`base` and `other` are pipelines; `lora` fits base; `misfit` is a LoRA of another architecture."""
    root = tmp_path_factory.mktemp("weights")
    for name, seed in (("base", 0), ("other", 1)):
        tiny_sdxl(seed).save_pretrained(root / name)
    lora(tiny_sdxl(0), root / "lora")
    lora(tiny_sd(0), root / "misfit")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def pool() -> ModelPool:
    """Shared by all engines of the tests, one after the other."""
    return ModelPool(device="cpu")


@pytest.fixture
def make_engine(tmp_path: Path, weights: dict[str, Path], pool: ModelPool) -> Callable[..., Engine]:
    def make(*names: str, **options: Any) -> Engine:
        base = str(weights["base"])
        models = [parse_model(f"{name}={weights[name]}", base) for name in names or ("base", "lora", "other")]
        options = {"scorers": [red, only_cats], "pool": pool, "limits": Limits(steps=10, side=64)} | options
        return Engine(tmp_path / "demo", models, **options)

    return make


@pytest.fixture
def ask() -> Callable[..., Ask]:
    def make(
        *models: str, prompts: tuple[str, ...] = ("a cat",), seeds: tuple[int, ...] = (0,), **settings: Any
    ) -> Ask:
        return Ask(prompts, seeds, models or ("base", "lora"), **({"steps": 2, "guidance": 2.0} | settings))

    return make

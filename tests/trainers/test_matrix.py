"""Every family with every method, LoRA and full: two steps, export, reload into a fresh pipeline, equal pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffalign.data import load_preferences
from diffalign.evaluation.lora import find_weights
from diffalign.pipelines import load_pipeline
from diffalign.synthesis import generate_images
from diffalign.trainers import PrefGRPOConfig, PrefGRPOTrainer, SelfNPOConfig, SelfNPOTrainer
from reward_models import FunctionRewardModel
from tests.synthesis.test_sampling import FAMILIES as SAMPLED
from tests.tiny import tiny_sd3
from tests.trainers.grpo.conftest import brightness
from tests.trainers.test_methods import METHODS, scored_rows, weights

FAMILIES = SAMPLED | {"sd3.5": lambda: tiny_sd3(version="3.5")}
PROMPTS = ["a red circle", "two blue squares"]
# Methods that learn from prompts alone.
ONLINE = {
    "selfnpo": {"batch_size": 2, "teacher_guidance": -4.0},
    "prefgrpo": {"batch_size": 2, "prompts_per_rollout": 1, "group_size": 2, "sampling_steps": 3, "clip_range": 1e-2},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One table, and one cache for all cells of a family."""
    return load_preferences(scored_rows(2, 3)), tmp_path_factory.mktemp("cache")


def picture(pipeline) -> np.ndarray:
    return np.asarray(generate_images(pipeline, ["a"], [0], steps=1, guidance=1.0, height=32, width=32)[0])


@pytest.fixture
def build(make_trainer, shared, tmp_path):
    """A trainer of any method for two steps."""
    table, cache = shared

    def make(family, method, adapter, pipeline):
        settings = {"adapter": adapter, "max_steps": 2, "resolution": 32}
        if method in METHODS:
            cls, config, own = METHODS[method]
            own = {"cache_dir": str(cache / family), **own}
            return make_trainer(pipeline, table, cls=cls, config=config, **settings, **own)
        settings |= {
            "output_dir": str(tmp_path / "run"),
            "learning_rate": 1e-2,
            "progress_bar": False,
            **ONLINE[method],
        }
        if method == "selfnpo":
            return SelfNPOTrainer(pipeline, SelfNPOConfig(**settings, cache_dir=str(cache / family)), PROMPTS)
        return PrefGRPOTrainer(
            pipeline, PrefGRPOConfig(**settings), PROMPTS, reward_models=[FunctionRewardModel(brightness)]
        )

    return make


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("method", [*METHODS, *ONLINE])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_export_and_reload(build, tmp_path, family, method, adapter):
    pipeline = FAMILIES[family]()
    untrained = picture(pipeline)
    trainer = build(family, method, adapter, pipeline)
    before = weights(trainer)
    metrics = trainer.train()["metrics"]
    assert math.isfinite(metrics["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))

    kind, file = find_weights(tmp_path / "run")
    assert kind == ("lora" if adapter == "lora" else "pipeline")
    if adapter == "lora":
        fresh = FAMILIES[family]()
        fresh.load_lora_weights(str(file.parent), weight_name=file.name)
    else:
        fresh = load_pipeline(str(file))
    assert np.array_equal(picture(fresh), picture(pipeline))
    assert not np.array_equal(picture(fresh), untrained)

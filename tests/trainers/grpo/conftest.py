"""Quick Pref-GRPO trainers on real tiny pipelines, with a scorer that can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.trainers import PrefGRPOConfig, PrefGRPOTrainer
from reward_models import FunctionRewardModel
from tests.tiny import tiny_sdxl

PROMPTS = ["a red circle", "two blue squares", "a green ring", "a star"]


def brightness(images, prompts):
    return [float(np.asarray(image).mean()) for image in images]


class Judge:
    """Prefers the brighter picture; keeps what it was asked."""

    name = "judge"

    def __init__(self):
        self.asked = []

    @property
    def identity(self):
        return {"id": self.name, "revision": None, "code_version": None}

    def compare(self, pairs, prompts):
        self.asked += zip(pairs, prompts, strict=True)
        gap = [np.asarray(a).mean() - np.asarray(b).mean() for a, b in pairs]
        return torch.tensor([0.5 + 0.5 * float(np.sign(value)) for value in gap])


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., PrefGRPOTrainer]:
    """A trainer of two groups of four; SDXL, two steps with noise of four, LoRA unless told otherwise."""

    def build(pipeline: Any = None, models: Any = None, *, cls: type = PrefGRPOTrainer, holdout=(), **settings: Any):
        defaults = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 4, "learning_rate": 1e-2}
        defaults |= {"prompts_per_rollout": 2, "group_size": 4, "sampling_steps": 4, "guidance_scale": 2.0}
        defaults |= {"log_every": 1, "progress_bar": False, "clip_range": 1e-3, "weight_decay": 0.0, "resolution": 32}
        models = [FunctionRewardModel(brightness)] if models is None else models
        config = PrefGRPOConfig(**(defaults | settings))
        return cls(pipeline or tiny_sdxl(), config, PROMPTS, reward_models=models, holdout_models=holdout)

    return build

"""A small preference table and quick trainers on real tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.data import PreferenceDataset, load_preferences
from diffalign.shapes import render, sample_caption
from diffalign.trainers import (
    DPOConfig,
    DPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    PreferenceTrainer,
    RankDPOConfig,
    RankDPOTrainer,
    SmPOConfig,
    SmPOTrainer,
)
from tests.tiny import tiny_sdxl


def preference_rows(count: int = 6, candidates: int = 2, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of real renders, best first."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        caption = sample_caption(rng)
        images = [render(caption, rng) for _ in range(candidates)]
        rows.append(
            {"prompt": f"{caption} {i}", "images": images, "preference": np.linspace(1, 0, candidates).tolist()}
        )
    return rows


@pytest.fixture(scope="session")
def table() -> PreferenceDataset:
    return load_preferences(preference_rows())


@pytest.fixture
def make_trainer(tmp_path: Path, table: PreferenceDataset) -> Callable[..., PreferenceTrainer]:
    """A trainer for four steps of two rows, SDXL and LoRA unless told otherwise."""

    def make(
        pipeline: Any = None, dataset: Any = None, *, cls: type = DPOTrainer, config: type = DPOConfig, **settings: Any
    ) -> PreferenceTrainer:
        defaults = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "batch_size": 2, "learning_rate": 1e-2}
        defaults |= {"log_every": 1, "progress_bar": False, "cache_dir": str(tmp_path / "cache")}
        return cls(pipeline or tiny_sdxl(), config(**(defaults | settings)), train_dataset=dataset or table)

    return make


METHODS = {
    "dpo": (DPOTrainer, DPOConfig, {}),
    "mapo": (MaPOTrainer, MaPOConfig, {}),
    "smpo": (SmPOTrainer, SmPOConfig, {"inversion_steps": 3}),
    "rankdpo": (RankDPOTrainer, RankDPOConfig, {}),
}


def scored_rows(count: int = 4, candidates: int = 4) -> list[dict]:
    rows = preference_rows(count, candidates)
    for row in rows:
        row["scores"] = {"clip": [0.1 * value for value in row["preference"]]}
    return rows


@pytest.fixture
def make(make_trainer, tmp_path):
    def build(method: str, folder: str = "run", pipeline=None, **settings):
        cls, config, own = METHODS[method]
        settings = {"output_dir": str(tmp_path / folder), "adapter": "none", "learning_rate": 1e-3, **own, **settings}
        return make_trainer(
            pipeline, settings.pop("dataset", None) or scored_rows(), cls=cls, config=config, **settings
        )

    return build

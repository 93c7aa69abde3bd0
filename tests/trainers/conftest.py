"""A small preference table and quick trainers on real tiny pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.data import PreferenceDataset, load_preferences
from diffalign.shapes import render, sample_caption
from diffalign.trainers import DPOConfig, DPOTrainer, PreferenceTrainer
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

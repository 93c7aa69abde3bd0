"""Small tables and pictures for the data tests."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

Rows = list[dict[str, Any]]


def picture(seed: int, height: int = 32, width: int = 32) -> Image.Image:
    """A smooth random picture whose halves differ in both directions."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def png(seed: int, height: int = 32, width: int = 32) -> bytes:
    buffer = io.BytesIO()
    picture(seed, height, width).save(buffer, format="PNG")
    return buffer.getvalue()


def pair_rows(count: int = 4, **cells: Any) -> Rows:
    """Rows of two pictures, the first always better."""
    return [
        {"prompt": f"prompt {i}", "images": [png(2 * i), png(2 * i + 1)], "preference": [1.0, 0.0], **cells}
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` converts Parquet into a cache folder; each test has its own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def make_rows() -> Callable[..., Rows]:
    return pair_rows

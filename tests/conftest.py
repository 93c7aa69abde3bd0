"""Every test runs offline, on few threads and deterministically."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

MARKERS = {
    "slow": "takes more than a few seconds; run by `make slow`",
    "gpu": "needs a CUDA device; skipped without one",
    "weights": "needs weights: the embedded default's, or published ones in the folder given by --weights-dir",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--weights-dir", default=None, metavar="DIR", help="folder of published reward models (docs/reward-models.md)"
    )


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and torch sees none")
    for item in items:
        if item.get_closest_marker("gpu"):  # not item.keywords: those hold the folder's name too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

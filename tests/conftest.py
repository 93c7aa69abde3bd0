"""Every test runs offline, on few threads and deterministically."""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import hypothesis
import pytest
import torch

# The same examples in every run, and no limit on the time that one may take: a busy machine is not a failure.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")

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


def _start_afresh() -> None:
    """Nothing that an earlier test left in this process: neither random numbers nor accelerate's one precision."""
    torch.manual_seed(0)
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def _fresh() -> None:
    _start_afresh()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """What several tests share is made before `_fresh` runs, and must not depend on which of them comes first."""
    if fixturedef.scope != "function":
        _start_afresh()

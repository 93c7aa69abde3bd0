"""One seed of each method on the embedded default: it makes more pictures of held-out captions right.

The controls lose a point or two of strict correctness, the methods gain from three to seven. Significance over seeds is
the matter of the studies (`make study-offline`, `make study-prefgrpo`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from diffalign.data import load_preferences
from diffalign.quickstart import Settings, measure, run, train

pytestmark = pytest.mark.slow
QUIET = ["progress_bar=false", "alarms=false"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, worker_id) -> tuple[Path, dict[str, Any]]:
    """The quickstart at its own size, run once for all workers: its folder and its report."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    with FileLock(root / "quickstart.lock"):
        report = run(root / "quickstart")  # a finished stage is found again
        first = root / "quickstart" / "first.json"
        if not first.is_file():  # of the one that did the work: the second measures nothing but its own memory
            first.write_text(json.dumps(report))
    return root / "quickstart", json.loads(first.read_text())


def strict(folder: Path, aligned: Path, prompts: int = 400) -> dict[str, Any]:
    return measure(aligned, folder, Settings(heldout_prompts=prompts))["scores"]["shapes-strict"]["difference"]


def test_dpo(quickstart):
    _, report = quickstart
    assert report["peak_memory_gib"] < 6
    difference = report["scores"]["shapes-strict"]["difference"]
    assert difference["n"] >= 400
    assert difference["ci95"][0] > 0, difference


@pytest.mark.parametrize("method", ["mapo", "smpo", "rankdpo"])
def test_the_other_offline_methods(method, quickstart, tmp_path):
    table = quickstart[0] / "preferences"
    train(table, tmp_path / "run", 0, QUIET, dataset=load_preferences(table), recipe=f"shapes-{method}")
    difference = strict(tmp_path / "report", tmp_path / "run")
    assert difference["mean"] > 0, difference


def test_prefgrpo(tmp_path):
    """Two thirds of the recipe's updates."""
    settings = [*QUIET, "max_steps=40", "holdout_every=null", "holdout_prompts=null", "holdout_rewards=[]"]
    train("shapes:train", tmp_path / "run", 0, settings, dataset="shapes:train", recipe="shapes-prefgrpo")
    difference = strict(tmp_path / "report", tmp_path / "run")
    assert difference["mean"] > 0, difference

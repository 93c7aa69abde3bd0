"""Two processes draw the same groups and find the same advantages as one; a group may lie across both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(folder: Path, processes: int) -> list[dict[str, float]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, "-m", "tests.trainers.grpo.program", str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one, two = run(tmp_path / "one", 1), run(tmp_path / "two", 2)  # three groups of four: the second is in both
    for x, y in zip(one, two, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=2e-3, abs=1e-4), name
    assert one[0]["reward/brightness/score"] == two[0]["reward/brightness/score"]
    assert one[0]["group/largest_advantage"] == two[0]["group/largest_advantage"]

"""Two processes draw the same groups and find the same advantages as one; a group may lie across both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[3]


def run(folder: Path, processes: int, *settings: str) -> list[dict[str, float]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, "-m", "tests.trainers.grpo.program", str(folder), *settings]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rollouts(folder: Path, iteration: int) -> list[dict]:
    """What each process drew, and what it thinks all pictures are worth."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"iteration-{iteration}-*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["sampling", "matching"])
def test_two_processes_equal_one(tmp_path, objective):
    # three groups of four: the second is in both
    one, two = (run(tmp_path / str(n), n, f'objective="{objective}"') for n in (1, 2))
    for x, y in zip(one, two, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=2e-3, abs=1e-4), name
    assert one[0]["reward/brightness/score"] == two[0]["reward/brightness/score"]
    for iteration in range(2):
        (alone,), both = rollouts(tmp_path / "1", iteration), rollouts(tmp_path / "2", iteration)
        assert both[0]["advantages"] == both[1]["advantages"] == pytest.approx(alone["advantages"], abs=1e-6)
        assert sorted(both[0]["pictures"] + both[1]["pictures"]) == sorted(alone["pictures"])
        assert len(both[0]["pictures"]) == len(both[1]["pictures"]) == 6
    assert max(map(abs, alone["advantages"])) > 1
    weights, others = (load_file(tmp_path / str(n) / "final" / "pytorch_lora_weights.safetensors") for n in (1, 2))
    moved = max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name)  # it starts at zero
    assert moved > 0
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], rtol=1e-6, atol=0.02 * moved), name

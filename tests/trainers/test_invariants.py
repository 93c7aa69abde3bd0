"""Batch size, accumulation, processes and kills change nothing that they should not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def run(
    folder: Path | str, kill_at: str = "never", *, processes: int = 1, **settings: object
) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder), kill_at, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
    if processes == 1:
        command = [sys.executable, "-m", "tests.trainers.program", *arguments]
    else:
        # `accelerate launch` starts CPU processes through MPI only; torchrun needs nothing but torch.
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [*launcher, "-m", "tests.trainers.program", *arguments]
        environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a run leaves: weights, optimizer, moving average and schedule of its last checkpoint."""
    checkpoint = sorted(folder.glob("checkpoint-*"))[-1]
    tensors = dict(load_file(checkpoint / "trainable.safetensors"))
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)
    for number, slots in optimizer["state"].items():
        tensors |= {f"optimizer {number} {name}": torch.as_tensor(value) for name, value in slots.items()}
    schedule = torch.load(checkpoint / "custom_checkpoint_0.pkl", weights_only=True)
    tensors["schedule"] = torch.tensor(schedule["last_epoch"])
    average = torch.load(checkpoint / "custom_checkpoint_1.pkl", weights_only=True)
    return tensors | {f"average {i}": value for i, value in enumerate(average["shadow_params"])}


def assert_equal(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_close(a: Path, b: Path) -> None:
    """Weights agree up to the order of additions, far closer than one step moves them."""
    first, second = (load_file(sorted(f.glob("checkpoint-*"))[-1] / "trainable.safetensors") for f in (a, b))
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-4, atol=5e-6), name


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


KILLS = ["step:1", "step:3", "save:4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run that is never killed, ``whole``, and for each of KILLS one that is killed there and started again."""
    root = tmp_path_factory.mktemp("runs")
    starts = [("whole", "never"), *(start for kill in KILLS for start in ((kill, kill), (kill, "never")))]
    result = run(",".join(str(root / name) for name, _ in starts), ",".join(kill for _, kill in starts))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", *[str(-signal.SIGKILL), "0"] * len(KILLS)][: len(starts) - 1]
    return root


@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_equals_never_killed_bit_for_bit(runs, kill):
    assert_equal(runs / kill, runs / "whole")
    assert (runs / kill / "metrics.jsonl").read_bytes() == (runs / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        # an epoch is three steps: what the second needs was inverted in the first, by a process that is gone
        {"method": "smpo", "inversion_steps": 2, "draws_per_row": 1},
        {"curriculum_stages": 3, "pairs": "all"},
    ],
)
def test_killed_inversions_and_curricula_continue_bit_for_bit(tmp_path, settings):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run(f"{whole},{killed},{killed}", "never,step:3,never", **settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", str(-signal.SIGKILL)]
    assert_equal(killed, whole)
    assert metrics(killed) == metrics(whole)


# Dropout inside the adapter is keyed by step and process, so it is off where batches are divided differently.
# Adam divides by the gradient's size, which turns rounding noise of tiny gradients into full steps: epsilon damps that.
SAME = {"lora_dropout": 0.0, "max_steps": 4, "log_every": 1, "adam_epsilon": 0.1}
MOVING_BETA = SAME | {"target_gradient_factor": 0.1, "warmup_steps": 0}


@pytest.fixture(scope="module")
def batch_of_four(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("four") / "run"
    result = run(folder, batch_size=4, **MOVING_BETA)
    assert result.returncode == 0, result.stderr
    return folder


def assert_same_metrics(a: Path, b: Path) -> None:
    """Rewards are 2500 times a difference of fp32 errors near 1, so their rounding noise is near 1e-3."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], rel=2e-3, abs=5e-3), name


def test_four_at_once_equal_four_accumulated(batch_of_four, tmp_path):
    folder = tmp_path / "run"
    result = run(folder, batch_size=1, gradient_accumulation_steps=4, **MOVING_BETA)
    assert result.returncode == 0, result.stderr
    assert_close(folder, batch_of_four)
    assert_same_metrics(folder, batch_of_four)


def test_two_processes_equal_one(batch_of_four, tmp_path):
    folder = tmp_path / "run"
    result = run(folder, batch_size=2, processes=2, **MOVING_BETA)
    assert result.returncode == 0, result.stderr
    assert_close(folder, batch_of_four)
    assert_same_metrics(folder, batch_of_four)
    # beta moves by the mean over both processes: by its own half of a batch each would move elsewhere
    betas, expected = ([line["beta"] for line in metrics(path)] for path in (folder, batch_of_four))
    assert betas == pytest.approx(expected, rel=1e-5)
    assert abs(betas[-1] / betas[0] - 1) > 1e-3


@pytest.mark.parametrize("method", ["dpo", "smpo"])
def test_two_processes_precompute_what_one_does(tmp_path, method):
    """SmPO: each process inverts its share before the first step, and finds the other's share in the cache."""
    settings = SAME | {"precompute_reference": 2, "adapter": "none", "method": method}
    settings |= {"inversion_steps": 3} if method == "smpo" else {}
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, extra in ((one, {"batch_size": 4}), (two, {"batch_size": 2, "processes": 2})):
        result = run(folder, **settings, **extra)
        assert result.returncode == 0, result.stderr
    assert_close(one, two)
    assert_same_metrics(one, two)

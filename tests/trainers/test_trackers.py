"""metrics.jsonl, the console, and the real trackers, offline."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image

from diffalign.errors import CheckpointError, ConfigError
from diffalign.trainers.config import DPOConfig
from diffalign.trainers.trackers import Trackers, check_trackers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def _metrics(step: int) -> dict[str, float]:
    return {"loss": 0.1 * step, "rewards/margins": 1 / 3 * step, "learning_rate": 1e-5}


def _run(accelerator: Accelerator, folder: Path, steps: range, resumed_step: int = 0) -> None:
    trackers = Trackers(accelerator, DPOConfig(log_every=1), folder, resumed_step=resumed_step)
    for step in steps:
        trackers.log(_metrics(step), step, timing={"seconds_per_step": 0.5 + step})
    trackers.close()
    trackers.close()


def test_metrics_are_one_json_object_a_line_and_exact(accelerator, tmp_path):
    _run(accelerator, tmp_path, range(1, 4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, **_metrics(step)} for step in (1, 2, 3)], "and no timing, which no run repeats"


def test_a_killed_and_resumed_run_leaves_the_same_file(accelerator, tmp_path):
    _run(accelerator, tmp_path / "whole", range(1, 9))
    _run(accelerator, tmp_path / "cut", range(1, 7))  # killed after step 6, in the middle of a line
    file = tmp_path / "cut" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 7, "lo')
    _run(accelerator, tmp_path / "cut", range(5, 9), resumed_step=4)  # its last checkpoint was step 4
    assert file.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"]


def test_every_line_is_on_disk_before_the_next_step(accelerator, tmp_path):
    trackers = Trackers(accelerator, DPOConfig(), tmp_path)
    trackers.log(_metrics(1), 1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1  # without close()
    trackers.close()


def test_a_run_from_the_beginning_starts_a_new_file(accelerator, tmp_path):
    _run(accelerator, tmp_path, range(1, 4))
    _run(accelerator, tmp_path, range(1, 2))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_damaged_file_is_named_and_kept(accelerator, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        Trackers(accelerator, DPOConfig(), tmp_path, resumed_step=3)
    assert "rubbish" in file.read_text()


def test_a_full_disk_names_the_file_and_the_run_goes_on_from_its_checkpoint(accelerator, tmp_path):
    """A limit on file size stands for the full disk."""
    trackers, file = Trackers(accelerator, DPOConfig(), tmp_path), tmp_path / "metrics.jsonl"
    trackers.log(_metrics(1), 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics.jsonl: .*free space.*resume=latest"):
            trackers.log(_metrics(2), 2)
        trackers.close()  # says nothing new
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    _run(accelerator, tmp_path, range(2, 3), resumed_step=1)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_nan_and_infinities_are_null(accelerator, tmp_path):
    trackers = Trackers(accelerator, DPOConfig(), tmp_path)
    trackers.log({"loss": math.nan, "grad_norm": math.inf}, 1)
    trackers.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "grad_norm": None}


def test_the_console_gets_one_readable_line(accelerator, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="diffalign"):
        _run(accelerator, tmp_path, range(3, 4))
    line = "step 3: loss 0.3, margin 1, learning rate 1e-05, seconds_per_step 3.5"
    assert line in caplog.messages


def test_lines_are_due_at_the_first_step_and_every_log_every(accelerator, tmp_path):
    trackers = Trackers(accelerator, DPOConfig(log_every=10), tmp_path)
    assert [step for step in range(1, 32) if trackers.due(step)] == [1, 10, 20, 30]
    trackers.close()
    with pytest.raises(ConfigError, match="log_every"):
        Trackers(accelerator, DPOConfig(log_every=0), tmp_path)


def test_other_processes_write_nothing(tmp_path):
    trackers = Trackers(SimpleNamespace(is_main_process=False), DPOConfig(trackers=["tensorboard"]), tmp_path)
    trackers.log(_metrics(1), 1)
    trackers.log_images({"validation": [Image.new("RGB", (4, 4))]}, 1)
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_unknown_and_missing_trackers_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="unknown tracker 'none'"):
        check_trackers(["none"])
    monkeypatch.setattr("diffalign.trainers.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"diffalign\[wandb\]"):
        check_trackers(["wandb"])


def test_tensorboard_for_real(accelerator, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = DPOConfig(trackers=["tensorboard"], project_name="proof", validation_prompts=["a", "b"])
    trackers = Trackers(accelerator, config, tmp_path)
    for step in (1, 2, 3):
        trackers.log(_metrics(step), step, timing={"seconds": 0.5})
    trackers.log_images({"validation": [Image.new("RGB", (8, 4), "red"), Image.new("RGB", (4, 8))]}, 3)
    trackers.close()
    trackers = Trackers(accelerator, config, tmp_path, resumed_step=2)  # step 3 is done again
    trackers.log({"loss": 7.0}, 3)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "proof"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("loss")] == [(1, 0.1), (2, 0.2), (3, 7.0)]
    assert {"rewards/margins", "seconds"} <= set(events.Tags()["scalars"])


def test_tensorboard_holds_the_pictures(accelerator, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(accelerator, DPOConfig(trackers=["tensorboard"], project_name="proof"), tmp_path)
    trackers.log_images({"validation": [Image.new("RGB", (8, 4), "red"), Image.new("RGB", (4, 8))]}, 3)
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "proof"))
    events.Reload()
    first = events.Images("validation/0")[0]
    assert (first.step, first.width, first.height) == (3, 8, 4)
    assert events.Tags()["images"] == ["validation/0", "validation/1"]


# Trackers below read their folders from the environment when they are imported, so each runs in a process of its own.
_SCRIPT = """
import sys
from accelerate import Accelerator
from PIL import Image
from diffalign.trainers.config import DPOConfig
from diffalign.trainers.trackers import Trackers
accelerator, config = Accelerator(cpu=True), DPOConfig(trackers=[sys.argv[1]], project_name="proof")
for resumed in (0, 2):
    trackers = Trackers(accelerator, config, sys.argv[2], resumed_step=resumed)
    for step in range(resumed + 1, resumed + 3):
        trackers.log({"loss": 0.5 * step}, step)
    trackers.log_images({"validation": [Image.new("RGB", (8, 8), "red")]}, resumed + 2)
    trackers.close()
"""


def _in_a_process(name: str, folder: Path, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", _SCRIPT, name, str(folder / "out")],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_trackio_for_real(tmp_path):
    pytest.importorskip("trackio")
    _in_a_process("trackio", tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    run_id = json.loads((tmp_path / "out" / "tracker_run.json").read_text())["id"]
    with sqlite3.connect(tmp_path / "trackio" / "proof.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    losses = {step: values["loss"] for _, step, blob in rows if "loss" in (values := json.loads(blob))}
    assert {name for name, _, _ in rows} == {f"out-{run_id}"}, "the resumed run continues the first"
    assert losses == {1: 0.5, 2: 1.0, 3: 1.5, 4: 2.0}
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2


@pytest.mark.slow
def test_wandb_for_real(tmp_path):
    pytest.importorskip("wandb")
    _in_a_process("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    run_id = json.loads((tmp_path / "out" / "tracker_run.json").read_text())["id"]
    runs = list((tmp_path / "out" / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(runs) >= 1, "both parts under one id"
    assert all((run / f"run-{run_id}.wandb").stat().st_size > 0 for run in runs)
    assert list((tmp_path / "out" / "wandb").rglob("*.png"))

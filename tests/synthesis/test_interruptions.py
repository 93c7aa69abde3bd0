"""Nothing interrupts a run for good: kills, other processes, damaged files, a full disk, other settings."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file, save_file

from diffalign.data import store_score_ranges
from diffalign.errors import ConfigError, DataError
from diffalign.synthesis.artists import Artist
from diffalign.synthesis.config import GenerationConfig, dump
from diffalign.synthesis.run import generate
from tests import children
from tests.synthesis.conftest import child, table_bytes

ROOT = Path(__file__).parents[2]


def kill_at(write: int, how: signal.Signals = signal.SIGKILL) -> Callable[[], None]:
    """Makes a process kill (or stop) itself in the middle of writing its n-th file."""
    return partial(_kill_at, write, how)


def _kill_at(write: int, how: signal.Signals) -> None:
    fsync, count = os.fsync, iter(range(1, 10**6))

    def counting(descriptor):
        if next(count) == write:
            os.kill(os.getpid(), how)
        fsync(descriptor)

    os.fsync = counting


def on_a_full_disk(config: GenerationConfig, said: Path) -> None:
    """Runs the generator and notes its error. A limit on file size stands for the full disk: the write itself fails."""
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - what is captured of the parent's output is a file too
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    try:
        generate(config)
    except DataError as error:
        said.write_text(str(error))


@pytest.mark.parametrize(("mode", "writes"), [("together", (2, 5, 6)), ("one_by_one", (3, 8))])
def test_a_run_killed_again_and_again_ends_with_the_same_bytes(clean, settings, mode, writes):
    config = settings("killed", load_models=mode)
    for write in writes:
        assert children.wait(child(config, kill_at(write))) == -signal.SIGKILL
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)
    assert not list(Path(config.output_dir).rglob("*.tmp"))


def test_what_a_pipeline_drew_is_kept_while_the_next_one_draws(settings, monkeypatch):
    config, draw, kept = settings("kept"), Artist.draw, []

    def watched(self, prompts, seed):
        if self.name == "two":
            file = Path(config.output_dir) / ".work" / "drawn" / "one" / f"{len(kept):05d}.parquet"
            deadline = time.monotonic() + 300
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            kept.append(file.exists())
        return draw(self, prompts, seed)

    monkeypatch.setattr(Artist, "draw", watched)
    generate(config)
    assert kept == [True] * 3


@pytest.mark.slow
def test_twenty_kills_at_random_times(clean, settings):
    config, rng = settings("killed"), random.Random(7)
    killed = 0
    while killed < 20:
        process = child(config)
        process.join(rng.uniform(0.02, 0.6))
        if process.exitcode is None:
            process.kill()
            process.join()
        killed += 1
        if killed % 5 == 0:  # now and then it gets a little further
            children.wait(child(config, kill_at(5)))
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


def test_two_processes_give_what_one_gives(clean, settings):
    config = settings("shared")
    second = child(config, process=1, processes=2)
    first = child(config, process=0, processes=2)
    assert [children.wait(process) for process in (first, second)] == [0, 0]
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


@pytest.mark.slow
def test_two_launched_processes_give_what_one_gives(clean, settings, tmp_path):
    config = settings("launched")
    (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, "-m", "diffalign.cli", "generate", str(tmp_path / "run.yaml")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)


def test_process_0_reports_no_damaged_shard_of_another(own_clean, monkeypatch):
    shard = Path(own_clean.output_dir) / "train-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    monkeypatch.setattr("diffalign.synthesis.run._STALL", 0.0)
    with pytest.raises(DataError, match=r"shards \[1\] are not finished, and processes \[1\] are not running"):
        generate(own_clean, process=0, processes=2)


def test_two_runs_in_one_folder_are_refused(settings):
    config = settings("shared")
    process = child(config, kill_at(4, signal.SIGSTOP))
    children.wait_until_stopped(process)
    try:
        with pytest.raises(ConfigError, match=rf"another run .*process {process.pid}"):
            generate(config)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert children.wait(process) == 0
    assert generate(config)["rows"] == 5


def test_processes_that_share_the_work_differently_are_refused(settings):
    """Process 1 of 2 holds a lock of its own, yet the run of one process would draw what it draws."""
    config = settings("mixed")
    alone = child(config, kill_at(4, signal.SIGSTOP))
    children.wait_until_stopped(alone)
    try:
        with pytest.raises(ConfigError, match=rf"another run .*process {alone.pid}.*0 of 1.*this is 1 of 2"):
            generate(config, process=1, processes=2)
    finally:
        os.kill(alone.pid, signal.SIGCONT)
    assert children.wait(alone) == 0
    assert generate(config, process=1, processes=2) is None  # it is gone, and left nothing to do


def test_other_settings_in_the_same_folder_are_refused(clean):
    with pytest.raises(ConfigError, match="seed: 0 there, 1 here"):
        generate(clean[0].model_copy(update={"seed": 1}))


def test_other_weights_under_the_same_name_are_refused(own_clean, painters, tmp_path):
    """A policy trained anew between two starts would be half of the table."""
    shutil.copytree(painters[0], tmp_path / "painter")
    one = own_clean.pipelines[0].model_copy(update={"model": str(tmp_path / "painter")})
    config = own_clean.model_copy(update={"pipelines": [one], "output_dir": str(tmp_path / "run")})
    generate(config)
    weights = tmp_path / "painter" / "unet" / "diffusion_pytorch_model.safetensors"
    changed = {name: tensor + 1e-3 for name, tensor in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="other settings .weights.one: "):
        generate(config)


def test_finishing_a_large_table_does_not_copy_it_into_a_cache(own_clean, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    (Path(own_clean.output_dir) / "score_ranges.json").unlink()
    generate(own_clean)
    ranges = json.loads((Path(own_clean.output_dir) / "score_ranges.json").read_text())
    monkeypatch.undo()
    assert ranges == {name: list(limits) for name, limits in store_score_ranges(own_clean.output_dir).items()}


def test_a_shard_cut_in_half_is_made_again(own_clean):
    folder = Path(own_clean.output_dir)
    before = table_bytes(folder)
    shard = folder / "train-00001.parquet"
    half = shard.read_bytes()[: shard.stat().st_size // 2]
    shard.write_bytes(half)
    generate(own_clean)
    assert table_bytes(folder) == before
    assert (folder / ".work" / "damaged" / "train-00001.parquet").read_bytes() == half


def test_a_full_disk_is_one_error_and_loses_nothing(clean, settings, tmp_path):
    config = settings("full")
    assert children.wait(child(config, kill_at(6))) == -signal.SIGKILL
    kept = table_bytes(config.output_dir)
    said = tmp_path / "said.txt"
    assert children.wait(children.start(on_a_full_disk, config, said)) == 0
    assert re.search(r"cannot write .*Free space", said.read_text())
    assert kept.items() <= table_bytes(config.output_dir).items()
    generate(config)
    assert table_bytes(config.output_dir) == table_bytes(clean[0].output_dir)

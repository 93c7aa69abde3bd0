from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch

from diffalign.errors import CheckpointError
from diffalign.trainers.checkpoints import damage, find_checkpoint, list_checkpoints, write_checkpoint


def save(folder: Path) -> None:
    (folder / "weights").write_bytes(b"1234")
    (folder / "nested").mkdir()
    (folder / "nested" / "state").write_text("x")


def write(run: Path, *steps: int, keep: int | None = None, after: int | None = None) -> None:
    """One after another; the first ``after`` a checkpoint that is not the newest, where one is given."""
    for step in steps:
        newest = max((step for step, _ in list_checkpoints(run)), default=0)
        write_checkpoint(run, step, save, keep=keep, after=newest if after is None else after)
        after = None


def test_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 10, keep=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 10]
    write(tmp_path, 11)
    assert len(list_checkpoints(tmp_path)) == 3


def test_checkpoints_of_an_abandoned_branch_are_set_aside_and_neither_pruned_nor_preferred(tmp_path, caplog):
    """100, 200 and 300, then 100 is continued: what is written next stays, and `latest` finds it."""
    write(tmp_path, 100, 200, 300)
    (tmp_path / "checkpoint-000200" / "weights").write_bytes(b"old")
    write(tmp_path, 150, keep=1, after=100)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-000150"
    assert "checkpoint-000300 is later than the checkpoint that was continued" in caplog.text
    write(tmp_path, 200, 300, keep=1)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-000300"
    write(tmp_path, 200, after=150)  # and the same again
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("abandoned-000200", "abandoned-000300", "abandoned-000300-2", "checkpoint-000200"),
    ]
    assert (tmp_path / "abandoned-000200" / "weights").read_bytes() == b"old"
    assert damage(tmp_path / "abandoned-000300") is None
    assert find_checkpoint(tmp_path, str(tmp_path / "abandoned-000300")) is not None


def test_a_checkpoint_is_written_again_in_its_own_place(tmp_path):
    """A run that stops right after a checkpoint saves the same step once more."""
    write(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_failed_write_leaves_no_checkpoint_and_the_older_ones(tmp_path):
    write(tmp_path, 1)

    def full(folder: Path) -> None:
        save(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left.*untouched"):
        write_checkpoint(tmp_path, 2, full, keep=1, after=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    assert damage(tmp_path / "checkpoint-000001") is None


def test_a_really_full_disk_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="could not write"):
        write_checkpoint(tmp_path, 1, lambda folder: _write_to_full_device(), keep=None, after=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kilobytes", [1, 64, 512])
def test_a_disk_that_fills_up_inside_torch_save_is_named_and_nothing_half_written_stays(tmp_path, kilobytes):
    """torch tells of a full disk as a RuntimeError; a limit on file size stands for the disk."""
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not write .*-000002: the disk is full. .*untouched"):
            zeros = torch.zeros(300_000)
            write_checkpoint(tmp_path, 2, lambda f: torch.save(zeros, f / "optimizer.bin"), keep=1, after=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_bug_while_saving_keeps_its_own_error(tmp_path):
    def broken(folder: Path) -> None:
        save(folder)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch") as caught:
        write_checkpoint(tmp_path, 1, broken, keep=None, after=0)
    assert not isinstance(caught.value, CheckpointError) and list(tmp_path.iterdir()) == []


def _write_to_full_device() -> None:
    with Path("/dev/full").open("wb") as file:
        file.write(b"x" * 10_000)


def test_a_partial_folder_is_never_taken_for_a_checkpoint(tmp_path):
    write(tmp_path, 1)
    partial = tmp_path / ".checkpoint-000002.partial"
    partial.mkdir()
    save(partial)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-000001"
    write(tmp_path, 2)  # and does not stand in the way
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-000002"


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda c: (c / "weights").write_bytes(b"12"), "weights is not what was written"),
        (lambda c: (c / "weights").write_bytes(b"1235"), "weights is not what was written"),
        (lambda c: (c / "nested" / "state").unlink(), "state is missing"),
        (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda c: (c / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, harm, problem):
    write(tmp_path, 1, 2)
    harm(tmp_path / "checkpoint-000002")
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-000001"
    assert "checkpoint-000002" in caplog.text
    assert problem in caplog.text
    with pytest.raises(CheckpointError, match=problem):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-000002"))


def test_when_all_are_damaged_nothing_is_started_over_silently(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-000001" / "weights").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path, "latest")


def test_none_refuses_a_folder_with_a_run_and_latest_starts_in_an_empty_one(tmp_path):
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path / "new", "latest") is None
    write(tmp_path, 3)
    with pytest.raises(CheckpointError, match="resume=latest"):
        find_checkpoint(tmp_path, "none")
    with pytest.raises(CheckpointError, match="no such folder"):
        find_checkpoint(tmp_path, str(tmp_path / "checkpoint-000009"))

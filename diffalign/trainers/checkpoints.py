"""Checkpoints: written whole or not at all, pruned by a limit, and never trusted without looking."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, is_disk_full

log = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")
_MANIFEST = "manifest.json"


def write_checkpoint(
    output_dir: Path,
    step: int,
    save: Callable[[Path], None],
    *,
    keep: int | None,
    after: int,
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write ``checkpoint-<step>`` under another name, seal it with a manifest of hashes, then rename it.

    Args:
        output_dir: the run's folder.
        step: optimizer steps done.
        save: writes the state into the folder it is given; called on every process, because sharded states need all.
        keep: how many checkpoints to leave, the new one included; None keeps all.
        after: step of the checkpoint that this run wrote or continued last, 0 for none. Later ones were written before
            an older one was continued: they are set aside as ``abandoned-<step>``, lest ``latest`` prefer them.
        is_main: whether this process renames and prunes.
        barrier: waits for all processes.

    Raises:
        CheckpointError: the state could not be written (for example, disk full); older checkpoints are untouched.
    """
    final, partial = output_dir / f"checkpoint-{step:06d}", output_dir / f".checkpoint-{step:06d}.partial"
    if is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        save(partial)
        barrier()
        if is_main:
            _seal(partial)
            _set_aside(output_dir, after)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(output_dir)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap a full disk in their own
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and not is_disk_full(error):
            raise
        why = "the disk is full" if isinstance(error, RuntimeError) else error
        raise CheckpointError(
            f"could not write {final}: {why}. The checkpoints before it are untouched; free space or choose another "
            "output_dir, then continue with resume=latest."
        ) from error
    barrier()
    if is_main and keep is not None:
        for _, old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _set_aside(output_dir: Path, after: int) -> None:
    """Rename checkpoints later than ``after`` to names that :func:`list_checkpoints` does not know."""
    for step, path in list_checkpoints(output_dir):
        if step > after:
            aside, number = output_dir / f"abandoned-{step:06d}", 1
            while aside.exists():
                number += 1
                aside = output_dir / f"abandoned-{step:06d}-{number}"
            path.rename(aside)
            log.warning("%s is later than the checkpoint that was continued; it is kept as %s", path, aside.name)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all finished checkpoints, oldest first; usable or not."""
    if not output_dir.is_dir():
        return []
    found = [(int(m.group(1)), path) for path in output_dir.iterdir() if (m := _NAME.fullmatch(path.name))]
    return sorted(found)


def find_checkpoint(output_dir: Path, resume: str) -> Path | None:
    """The checkpoint to continue from.

    Args:
        output_dir: the run's folder.
        resume: ``none``, ``latest`` or the path of a checkpoint.

    Returns:
        None to start from the beginning.

    Raises:
        CheckpointError: ``none`` but the folder holds a run; a path that is no usable checkpoint; ``latest`` but
            every checkpoint is damaged.
    """
    existing = list_checkpoints(output_dir)
    if resume == "none":
        if existing:
            raise CheckpointError(
                f"{output_dir} already holds a run (up to {existing[-1][1].name}). Pass resume=latest to continue it, "
                "or another output_dir to start anew."
            )
        return None
    if resume != "latest":
        path = Path(resume)
        if problem := damage(path):
            raise CheckpointError(f"cannot resume from {path}: {problem}.")
        return path
    for _, path in reversed(existing):
        problem = damage(path)
        if problem is None:
            return path
        log.warning("%s cannot be used (%s); trying the one before it.", path, problem)
    if existing:
        raise CheckpointError(
            f"no checkpoint in {output_dir} can be used: {existing[-1][1].name} {damage(existing[-1][1])}."
        )
    return None


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as it was written."""
    manifest = folder / _MANIFEST
    if not folder.is_dir():
        return "there is no such folder"
    if not manifest.is_file():
        return "its manifest.json is missing"
    try:
        files: dict[str, str] = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return "its manifest.json cannot be read"
    for name, digest in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} is not what was written"
    return None


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = {str(path.relative_to(folder)): _digest(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps({"files": manifest}, indent=1))
    _sync(folder / _MANIFEST)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_trainable(
    denoiser: nn.Module, accelerator: Accelerator, models: list[nn.Module], weights: list[dict], folder: str
) -> None:
    """A save hook of accelerate's that writes the trained parameters alone, on the main process."""
    weights.clear()  # what accelerate would have written
    if accelerator.is_main_process:
        tensors = {n: p.detach().cpu().contiguous() for n, p in denoiser.named_parameters() if p.requires_grad}
        save_file(tensors, Path(folder) / "trainable.safetensors")


def load_trainable(denoiser: nn.Module, models: list[nn.Module], folder: str) -> None:
    """The load hook that belongs to :func:`save_trainable`.

    Raises:
        CheckpointError: the file holds other parameters than are trained.
    """
    models.clear()
    tensors = load_file(Path(folder) / "trainable.safetensors")
    wanted = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())[:3]
        raise CheckpointError(f"{folder} holds other weights than this run trains; they differ in {odd} and more.")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])

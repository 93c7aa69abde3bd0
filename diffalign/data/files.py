"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, renamed to ``path`` when the block ends well and removed when it does not.

    Args:
        path: the final name; its folder is made when missing.

    Raises:
        DataError: the disk is full, or the place cannot be written to. What was at ``path`` before is still there.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{threading.get_native_id()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Free space or choose another folder."
        ) from error
    finally:
        with suppress(OSError):  # where the folder itself cannot be reached, the error above already says so
            temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file by :func:`atomic_file`, in UTF-8."""
    with atomic_file(path) as file:
        file.write(text.encode())


def remove_stale(folder: Path) -> list[str]:
    """Remove what killed processes of this machine left half-written.

    Returns:
        Names of the removed files.
    """
    removed = []
    for path in folder.glob(".*.tmp"):
        parts = path.name.split(".")
        if len(parts) < 4 or not parts[-2].isdigit() or f".{socket.gethostname()}." not in path.name:
            continue
        if not _is_running(int(parts[-2])):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""A folder of safetensors shards that tensors are written to once and then read from the disk's own pages.

Shards appear whole (a killed process loses what it had not yet flushed, nothing else); one that was damaged later is
named, put aside and made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import DataError
from .files import atomic_file, remove_stale

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1


class TensorCache:
    """Tensors by key.

    Args:
        folder: where the shards are; made when missing.
        manifest: what the tensors are (kind, encoder, precision); must equal the folder's own when it has one.

    Raises:
        DataError: the folder belongs to other encoders or another version, or cannot be written to.
    """

    shard_bytes = 256 * 2**20  # a shard is written when it has this size,
    flush_seconds = 60.0  # or is this old: a kill loses no more

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, {"schema_version": SCHEMA_VERSION, **manifest}
        self._handles: list[Any] = []
        self._place: dict[str, int] = {}
        self._opened: set[str] = set()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes, self._last_flush = 0, time.monotonic()
        self._check_manifest()
        self.refresh()

    def __contains__(self, key: object) -> bool:
        return key in self._place or key in self._pending

    def __len__(self) -> int:
        return len(self._place) + len(self._pending)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._place, *self._pending])

    def get(self, key: str) -> Tensor:
        """The tensor of ``key``: a view of the mapped file. Not to be written to."""
        if key in self._pending:
            return self._pending[key]
        try:
            return self._handles[self._place[key]].get_tensor(key)
        except KeyError:
            raise DataError(f"{self.folder} has no entry {key}. Build the cache again.") from None

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors (CPU); those of one call come into one shard."""
        for key, tensor in tensors.items():
            self._pending[key] = tensor.contiguous().clone()  # a slice would keep, and store, all of its batch
            self._pending_bytes += tensor.nbytes
        late = time.monotonic() - self._last_flush > self.flush_seconds
        if late or self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a shard, and open it."""
        if self._pending:
            name = hashlib.blake2b("\n".join(sorted(self._pending)).encode(), digest_size=12).hexdigest()
            path = self.folder / f"shard-{name}.safetensors"
            with atomic_file(path) as file:
                file.write(save(self._pending, metadata={key: str(value) for key, value in self.manifest.items()}))
            self._pending, self._pending_bytes = {}, 0
            self._open(path)
        self._last_flush = time.monotonic()

    def refresh(self) -> None:
        """Open the shards that other processes have written since."""
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            if path.name not in self._opened:
                self._open(path)

    def clean(self) -> None:
        """Remove what killed processes left half-written; for one process, before the others write."""
        for name in remove_stale(self.folder):
            log.warning(
                "%s: removed %s, half-written by a process that was killed; it is made again", self.folder, name
            )

    def _open(self, path: Path) -> None:
        try:
            handle = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s) and put aside as *.damaged; its entries are made again", path, error)
            _put_aside(path)
            return
        self._place.update(dict.fromkeys(handle.keys(), len(self._handles)))
        self._handles.append(handle)
        self._opened.add(path.name)

    def _check_manifest(self) -> None:
        path = self.folder / "manifest.json"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(json.dumps(self.manifest, indent=1).encode())
            return
        found = read_manifest(path)
        if found != self.manifest:
            raise DataError(
                f"{self.folder} was made for {found}, this run needs {self.manifest}. Choose another cache_dir or "
                "remove it."
            )


def read_manifest(path: Path) -> dict[str, Any]:
    """What a cache folder says of itself."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable manifest ({error}). Remove the folder; it is made again.") from error


def _put_aside(path: Path) -> None:
    """Rename a damaged shard; in a folder that may only be read it stays, and is skipped each time."""
    try:
        path.replace(path.with_name(path.name + ".damaged"))
    except OSError as error:
        log.warning("%s cannot be renamed (%s); it is skipped", path, error.strerror)


def as_exact_half(tensor: Tensor) -> Tensor:
    """The tensor in fp16 or bf16 if that loses nothing (an encoder that ran in half precision), else as it is."""
    for dtype in (torch.float16, torch.bfloat16):
        half = tensor.to(dtype)
        if torch.equal(half.to(tensor.dtype), tensor):
            return half
    return tensor

"""The small facts about every row that training needs without its images: id, prompt hash, image hashes and sizes."""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .files import atomic_file
from .geometry import Size
from .images import content_hash, image_size
from .preferences import PreferenceDataset

log = logging.getLogger(__name__)

BLOCK = 2048  # rows per index file: the unit of work that is shared out, and that a kill can lose
HASH = "S32"


@dataclass
class RowIndex:
    """Facts about rows, as arrays.

    Args:
        row_ids: (N,) content hash of each row.
        prompts: (N,) hash of its prompt.
        images: hash of each image, row after row.
        sizes: (images, 2) height and width.
        ends: (N + 1,) where each row's images begin and the last ends.
    """

    row_ids: np.ndarray
    prompts: np.ndarray
    images: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.row_ids)

    def prompt(self, row: int) -> str:
        """Hash of the row's prompt."""
        return self.prompts[row].decode()

    def image_hashes(self, row: int) -> list[str]:
        """Hash of each image of the row."""
        return [value.decode() for value in self.images[self.ends[row] : self.ends[row + 1]]]

    def image_sizes(self, row: int) -> list[Size]:
        """(height, width) of each image of the row."""
        return [(int(h), int(w)) for h, w in self.sizes[self.ends[row] : self.ends[row + 1]]]


def prompt_hash(prompt: str) -> str:
    """Hash of a prompt."""
    return content_hash(prompt.encode())


def index_rows(
    dataset: PreferenceDataset,
    folder: Path,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> RowIndex:
    """Read every row once, and remember what was seen.

    The work is cut into blocks of rows that the processes share and that a later run finds again. A dataset without a
    fingerprint (rows in memory) is read whole by each process, and nothing is stored.

    Args:
        dataset: the rows.
        folder: where the blocks are stored.
        process_index: this process.
        num_processes: how many share the work.
        barrier: waits for all of them.
        progress: show a bar.

    Raises:
        DataError: an image's header cannot be read.
    """
    starts = range(0, len(dataset), BLOCK)
    if dataset.fingerprint is None:
        return _join([_read_block(dataset, range(len(dataset)), progress)])
    files = [folder / f"{_name(dataset)}-{start:09d}.npz" for start in starts]
    for number, (start, path) in enumerate(zip(starts, files, strict=True)):
        if number % num_processes == process_index and not _is_readable(path):
            block = _read_block(dataset, range(start, min(start + BLOCK, len(dataset))), progress)
            buffer = io.BytesIO()
            np.savez(buffer, **vars(block))
            with atomic_file(path) as file:
                file.write(buffer.getvalue())
    barrier()
    return _join([_load(path) for path in files])


def _name(dataset: PreferenceDataset) -> str:
    return f"rows-{dataset.fingerprint}"


def _load(path: Path) -> RowIndex:
    with np.load(path, allow_pickle=False) as arrays:
        return RowIndex(**{name: arrays[name] for name in RowIndex.__dataclass_fields__})


def _is_readable(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        _load(path)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); it is made again", path, error)
        return False
    return True


def _read_block(dataset: PreferenceDataset, rows: range, progress: bool) -> RowIndex:
    row_ids: list[str] = []
    prompts: list[str] = []
    images: list[str] = []
    sizes: list[Size] = []
    ends = [0]
    bar: Iterable[int] = tqdm(rows, desc="Reading rows", disable=not progress or len(rows) < 100, leave=False)
    for index in bar:
        row = dataset[index]
        row_ids.append(row.row_id)
        prompts.append(prompt_hash(row.prompt))
        for number, data in enumerate(row.image_bytes):
            images.append(content_hash(data))
            sizes.append(image_size(data, f"{row.where}, images[{number}]"))
        ends.append(len(images))
    return RowIndex(
        np.asarray(row_ids, dtype=np.str_),
        np.asarray(prompts, dtype=HASH),
        np.asarray(images, dtype=HASH),
        np.asarray(sizes, dtype=np.int32).reshape(-1, 2),
        np.asarray(ends, dtype=np.int64),
    )


def _join(blocks: list[RowIndex]) -> RowIndex:
    offsets = np.cumsum([0, *(block.ends[-1] for block in blocks)])
    ends = [block.ends[1:] + offset for block, offset in zip(blocks, offsets[:-1], strict=True)]
    return RowIndex(
        np.concatenate([block.row_ids for block in blocks]),
        np.concatenate([block.prompts for block in blocks]),
        np.concatenate([block.images for block in blocks]),
        np.concatenate([block.sizes for block in blocks]),
        np.concatenate([np.zeros(1, dtype=np.int64), *ends]),
    )


def short_hash(*parts: object) -> str:
    """A short hash of some values."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

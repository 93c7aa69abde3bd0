"""The preference table: its columns, one row in Python, and writing it as Parquet shards."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from ..errors import DataError
from .files import atomic_file
from .images import content_hash, decode_image, image_bytes_of
from .judgement import read_judgement

log = logging.getLogger(__name__)

SOURCE = {
    "model": Value("string"),
    "revision": Value("string"),
    "seed": Value("int64"),
    "steps": Value("int32"),
    "guidance": Value("float64"),
    "scheduler": Value("string"),
    "pipeline": Value("string"),
}
FEATURES = Features(
    {
        "prompt": Value("string"),
        "images": List(ImageFeature()),
        "sources": List(SOURCE),
        "scores": List({"name": Value("string"), "values": List(Value("float64"))}),
        "preference": List(Value("float64")),
        "rank": List(Value("int32")),
        "row_id": Value("string"),
    }
)
ROW_GROUP_ROWS = 100  # what the hub's viewer reads at once
ROW_GROUP_BYTES = 128 * 2**20  # also keeps an Arrow array of bytes far below its limit of 2 GiB


def row_id_of(prompt: str, image_bytes: Sequence[bytes]) -> str:
    """Content hash of a row: its prompt and the bytes of its images, in order."""
    return row_id_from_hashes(prompt, [content_hash(data) for data in image_bytes])


def row_id_from_hashes(prompt: str, image_hashes: Sequence[str]) -> str:
    """:func:`row_id_of` from the :func:`~diffalign.data.images.content_hash` of each image."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=16)
    digest.update("".join(f"\0{image}" for image in image_hashes).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class PreferenceRow:
    """One prompt and its k >= 2 judged candidates.

    Args:
        prompt: the text.
        image_bytes: k encoded pictures.
        preference: k shares of wins in [0, 1].
        rank: k ranks; 1 is best, equal ranks are ties.
        scores: raw scores by reward model, k each; NaN where missing.
        sources: where each candidate came from (keys of ``SOURCE``); empty when unknown.
        row_id: content hash; computed when empty.
        number: row number in the table it was read from, for messages.
    """

    prompt: str
    image_bytes: list[bytes]
    preference: list[float]
    rank: list[int]
    scores: dict[str, list[float]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    row_id: str = ""
    number: int | None = None

    def __post_init__(self) -> None:
        if not self.row_id:
            object.__setattr__(self, "row_id", row_id_of(self.prompt, self.image_bytes))

    @property
    def where(self) -> str:
        """How messages name this row."""
        return f"row {self.row_id}" if self.number is None else f"row {self.number}"

    @cached_property
    def images(self) -> list[Image.Image]:
        """The k pictures in RGB, decoded when first asked for."""
        return [decode_image(data, f"{self.where}, images[{index}]") for index, data in enumerate(self.image_bytes)]

    def to_record(self) -> dict[str, Any]:
        """The row as stored: plain values in the columns of ``FEATURES``."""
        return {
            "prompt": self.prompt,
            "images": [{"bytes": data, "path": None} for data in self.image_bytes],
            "sources": [{key: source.get(key) for key in SOURCE} for source in self.sources],
            "scores": [
                {"name": name, "values": [None if math.isnan(value) else value for value in values]}
                for name, values in self.scores.items()
            ],
            "preference": self.preference,
            "rank": self.rank,
            "row_id": self.row_id,
        }

    @classmethod
    def from_record(
        cls, record: Mapping[str, Any], *, number: int | None = None, score: str | None = None
    ) -> PreferenceRow:
        """Check and convert the cells of a row.

        Args:
            record: cells by column; `images` may hold bytes, PIL images or paths.
            number: row number, for messages.
            score: see :func:`~diffalign.data.judgement.read_judgement`.

        Raises:
            DataError: a cell cannot be used.
        """
        where = "the row" if number is None else f"row {number}"
        prompt = read_prompt(record, where)
        cells = read_image_cells(record, where)
        judgement = read_judgement(record, len(cells), where, score=score)
        return cls(
            prompt=prompt,
            image_bytes=[image_bytes_of(cell, f"{where}, images[{index}]") for index, cell in enumerate(cells)],
            preference=judgement.preference,
            rank=judgement.rank,
            scores=judgement.scores,
            sources=read_sources(record.get("sources"), len(cells), where),
            row_id=record.get("row_id") or "",
            number=number,
        )


def read_prompt(record: Mapping[str, Any], where: str) -> str:
    """The prompt of a row; an empty one is allowed, a missing one is not."""
    prompt = record.get("prompt")
    if not isinstance(prompt, str):
        raise DataError(f"{where}, prompt: expected a text, got {prompt!r}. Fill it in or remove the row.")
    return prompt


def read_image_cells(record: Mapping[str, Any], where: str) -> Sequence[Any]:
    """The k >= 2 image cells of a row."""
    cells = record.get("images")
    if isinstance(cells, (str, bytes)) or not isinstance(cells, Sequence):
        raise DataError(f"{where}, images: expected a list of at least two images, got {type(cells).__name__}.")
    refuse_few(len(cells), where)
    return cells


def refuse_few(count: int, where: str) -> None:
    """A preference needs two candidates."""
    if count < 2:
        raise DataError(f"{where}, images: expected at least two images of the prompt to compare, got {count}.")


def read_sources(value: Any, count: int, where: str) -> list[dict[str, Any]]:
    """One struct per candidate, or none at all."""
    if value is None or len(value) == 0:
        return []
    if len(value) != count:
        raise DataError(f"{where}, sources: expected {count} entries, one per image, got {len(value)}.")
    sources = [dict(source or {}) for source in value]
    for source in sources:
        for key in source.keys() - SOURCE.keys():
            near = difflib.get_close_matches(key, SOURCE, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{where}, sources: unknown key {key!r}{hint} Known: {', '.join(SOURCE)}.")
    return sources


def write_preferences(
    rows: Iterable[Mapping[str, Any] | PreferenceRow],
    folder: str | Path,
    shard_rows: int = 1000,
    *,
    split: str = "train",
    append: bool = False,
) -> list[Path]:
    """Write a preference table that ``load_preferences`` and ``datasets.load_dataset`` read.

    Each shard appears under its name when it is complete and safe on the disk, never before.

    Args:
        rows: rows, or their cells by column (see docs/data-format.md).
        folder: made when missing.
        shard_rows: rows per file.
        split: first part of the file names.
        append: add shards to a table that is already there, instead of refusing.

    Returns:
        The files written.

    Raises:
        DataError: a row cannot be used, the folder holds this split already, or the disk is full. Shards that are
            complete stay.
    """
    folder = Path(folder)
    present = sorted(folder.glob(f"{split}-*.parquet"))
    if present and not append:
        raise DataError(
            f"{folder} already holds {len(present)} shards of the split {split!r}. Choose another folder, remove it, "
            "or pass append=True."
        )
    taken = [int(match[1]) for path in present if (match := re.fullmatch(rf"{split}-(\d+)", path.stem))]
    number = max(taken, default=-1) + 1
    stream = iter(rows)
    written: list[Path] = []
    while chunk := list(islice(stream, 1)):  # one row is taken first, so that no empty shard is written
        path = folder / f"{split}-{number:05d}.parquet"
        start = len(written) * shard_rows
        try:
            write_shard(_chain(chunk, islice(stream, shard_rows - 1)), path, first_number=start)
        except DataError as error:
            kept = f" The first {start} rows are complete in {folder}." if written else ""
            raise DataError(f"{error}{kept}") from error
        written.append(path)
        number += 1
    if not written:
        raise DataError(f"expected rows to write into {folder}, got none.")
    return written


def _chain(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from first
    yield from rest


def write_shard(rows: Iterable[Mapping[str, Any] | PreferenceRow], path: Path, *, first_number: int = 0) -> None:
    """Check rows and write them as one Parquet file, whole or not at all.

    Args:
        rows: as in :func:`write_preferences`.
        path: the file.
        first_number: number of the first row, for messages.

    Raises:
        DataError: a row cannot be used, or the file cannot be written.
    """
    checked = (
        PreferenceRow.from_record(row.to_record() if isinstance(row, PreferenceRow) else row, number=number)
        for number, row in enumerate(rows, first_number)
    )
    write_parquet((row.to_record() for row in checked), path, FEATURES)


def write_parquet(records: Iterable[Mapping[str, Any]], path: Path, features: Features) -> None:
    """Write one Parquet file, whole or not at all.

    Args:
        records: cells by column.
        path: the file; its folder is made when missing.
        features: columns; stored in the file, so that `datasets` shows images as images.

    Raises:
        DataError: the file cannot be written; nothing is left of it then.
    """
    schema = features.arrow_schema
    with atomic_file(path) as sink, pq.ParquetWriter(sink, schema) as writer:
        for group in _row_groups(records):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _row_groups(records: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    size = 0
    for record in records:
        group.append(record)
        size += sum(map(_bytes_in, record.values()))
        if len(group) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes_in(cell: Any) -> int:
    if isinstance(cell, bytes):
        return len(cell)
    if isinstance(cell, list):
        return sum(map(_bytes_in, cell))
    return sum(map(_bytes_in, cell.values())) if isinstance(cell, Mapping) else 0

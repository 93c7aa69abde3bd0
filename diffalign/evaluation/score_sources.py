"""The pictures and prompts that `diffalign score` is given: a folder, a preference table, or a list of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import decode_image, image_bytes_of
from ..data.preferences import to_own_columns
from ..data.schema import read_prompt
from ..data.sources import METADATA, FolderTable, Table, open_table
from ..errors import ConfigError, DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_FILE_COLUMNS = ("file_name", "image", "picture", "path")
_PROMPT_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class ScoredPicture:
    """One picture to score.

    Args:
        row: number of its row in the source.
        number: which of the row's pictures it is.
        prompt: what it is judged under.
        name: its file, relative to the source; empty when a table holds its bytes.
        read: gives its encoded bytes.
    """

    row: int
    number: int
    prompt: str
    name: str
    read: Callable[[], bytes]

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"row {self.row}, images[{self.number}]" + (f" ({self.name})" if self.name else "")

    def key(self) -> str:
        """A hash of its bytes and prompt: what a stored score belongs to."""
        return hashlib.blake2b(self.read() + b"\0" + self.prompt.encode(), digest_size=12).hexdigest()

    def image(self) -> Image.Image:
        """The picture in RGB.

        Raises:
            DataError: it cannot be read; names the row.
        """
        return decode_image(self.read(), self.where)


def open_pictures(
    source: str | Path, *, prompt: str | None = None, split: str = "train", revision: str | None = None
) -> list[ScoredPicture]:
    """Find all pictures and their prompts.

    Args:
        source: a preference table (whatever ``load_preferences`` takes; it needs no judgements yet); a .jsonl or .csv
            with a picture file in ``file_name`` (or image, picture, path), its prompt in ``prompt`` (or caption, text),
            and files named relative to it; or a folder of pictures with such a metadata.jsonl/.csv, with a .txt file of
            the same name beside each, or with ``prompt``.
        prompt: the prompt of all pictures; only for a folder or list without its own.
        split: split of a table.
        revision: revision of a hub table.

    Raises:
        DataError: there is nothing of that kind, or a row lacks a picture or prompt; names it.
        ConfigError: a prompt is given where the source has its own.
    """
    path = Path(source)
    if path.is_dir() and not _holds_table(path):
        found = list(_folder(path, prompt))
        if not found:
            raise DataError(f"{path}: expected pictures ({', '.join(sorted(SUFFIXES))}) or a table, found none.")
        return found
    table = open_table(path if path.exists() else str(source), split=split, revision=revision)
    names = set(table.columns)
    listed = isinstance(table, FolderTable) and "images" not in names and bool(names.intersection(_FILE_COLUMNS))
    if prompt is not None and not (listed and not names.intersection(_PROMPT_COLUMNS)):
        raise ConfigError(f"{source} has its own prompts; leave --prompt out.")
    found = list(_list(table, prompt) if listed else _table(table))  # type: ignore[arg-type]
    if not found:
        raise DataError(f"{source}: expected rows, got an empty table.")
    return found


def _holds_table(folder: Path) -> bool:
    places = [folder, *(place for place in folder.iterdir() if place.is_dir())]
    if any((place / name).is_file() for place in places for name in (*METADATA, "state.json", "dataset_dict.json")):
        return True
    return any(folder.rglob("*.parquet"))


def _folder(folder: Path, prompt: str | None) -> Iterator[ScoredPicture]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    for row, path in enumerate(files):
        name = path.relative_to(folder).as_posix()
        yield ScoredPicture(
            row, 0, prompt if prompt is not None else _caption(path, name, row), name, _reader(path, f"row {row}")
        )


def _caption(path: Path, name: str, row: int) -> str:
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"row {row} ({name}): expected its prompt in {beside.name} beside it ({error}). Write that file, list the "
            "pictures in a metadata.jsonl, or give one --prompt for all."
        ) from error
    if not text:
        raise DataError(f"row {row} ({name}): the prompt in {beside.name} is empty.")
    return text


def _list(table: FolderTable, prompt: str | None) -> Iterator[ScoredPicture]:
    """One file a row."""
    for row, cells in enumerate(table.rows):
        name = _text(cells, _FILE_COLUMNS, f"{table.name}, row {row}")
        own = prompt if prompt is not None else _text(cells, _PROMPT_COLUMNS, f"{table.name}, row {row}")
        path = Path(name)  # an absolute one stays as it is below
        yield ScoredPicture(row, 0, own, name, _reader(table.folder / path, f"{table.name}, row {row}"))


def _text(cells: Mapping[str, Any], columns: Sequence[str], where: str) -> str:
    for column in columns:
        value = cells.get(column)
        if isinstance(value, str) and value.strip():
            return value
    raise DataError(f"{where}: expected text in {' or '.join(columns)}, got the columns {', '.join(cells) or 'none'}.")


def _table(table: Table) -> Iterator[ScoredPicture]:
    """Any number of pictures a row; judgements are not asked for, since this command is what makes them."""
    record = lru_cache(maxsize=4)(table.record)  # the pictures of a row are asked for one after another
    for row, outline in enumerate(table.outlines()):
        where = f"{table.name}, row {row}"
        prompt = read_prompt({"prompt": outline.get("prompt", outline.get("caption"))}, where)
        for number in range(_count(outline, where)):
            yield ScoredPicture(row, number, prompt, "", _cell_reader(record, table.name, row, number))


def _count(outline: Mapping[str, Any], where: str) -> int:
    if "images" not in outline and "caption" in outline:  # Pick-a-Pic: jpg_0 and jpg_1
        return 2
    images = outline.get("images")
    count = len(images) if isinstance(images, list) else images
    if not isinstance(count, int):
        raise DataError(
            f"{where}: expected pictures in the column images (a list) or file_name, got {', '.join(outline)}."
        )
    return count


def _reader(path: Path, where: str) -> Callable[[], bytes]:
    def read() -> bytes:
        return image_bytes_of(path, where)

    return read


def _cell_reader(record: Callable[[int], Mapping[str, Any]], table: str, row: int, number: int) -> Callable[[], bytes]:
    def read() -> bytes:
        where = f"{table}, row {row}"
        cells = to_own_columns(dict(record(row)), where)["images"]
        return image_bytes_of(cells[number], f"{where}, images[{number}]")

    return read

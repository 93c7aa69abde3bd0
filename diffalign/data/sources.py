"""Where rows come from: Parquet and hub datasets, an image folder with a table, or rows in memory.

Each becomes a :class:`Table`, which gives single rows with their images, and all rows without them.
"""

from __future__ import annotations

import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.data_files import DataFilesList, get_data_patterns
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from ..errors import DataError
from .images import content_hash

SCORE_RANGES = "score_ranges.json"
GENERATION_REPORT = "generation_report.json"  # beside a table that the generator made: what decided it
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
PICTURES = {"images", "jpg_0", "jpg_1"}
Cells = dict[str, Any]


class Table(ABC):
    """Rows by number, with their original columns.

    Args:
        name: how messages name the table.
        columns: names of its columns.
        fingerprint: equal only for equal content; None when that is not known.
        score_ranges: (lowest, highest) score by reward model, as stored with the data set; empty when nothing is.
    """

    name: str
    columns: list[str]
    fingerprint: str | None
    score_ranges: Mapping[str, tuple[float, float]] = MappingProxyType({})

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def record(self, number: int) -> Cells:
        """All cells of a row."""

    @abstractmethod
    def outline(self, number: int) -> Cells:
        """The cells of a row that hold no pictures."""

    @abstractmethod
    def outlines(self) -> Iterator[Cells]:
        """Each row without its pictures; `images` is the number of them (or what stands there, if it is no list)."""


class ListTable(Table):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "the rows") -> None:
        self.rows, self.name, self.fingerprint = rows, name, None
        self.columns = list(dict.fromkeys(column for row in rows for column in row))

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, number: int) -> Cells:
        return dict(self.rows[number])

    def outline(self, number: int) -> Cells:
        return {key: cell for key, cell in self.rows[number].items() if key not in PICTURES}

    def outlines(self) -> Iterator[Cells]:
        for row in self.rows:
            yield {key: len(cell) if key == "images" and _is_list(cell) else cell for key, cell in row.items()}


class FolderTable(ListTable):
    """An image folder with a table that names the pictures of each prompt."""

    def __init__(self, metadata: Path) -> None:
        super().__init__(_read_metadata(metadata), name=str(metadata))
        self.folder = metadata.parent.resolve()
        self.fingerprint = content_hash(repr([(row, self._stamps(row)) for row in self.rows]).encode())

    def _stamps(self, row: Mapping[str, Any]) -> list[tuple[int, int] | None]:
        """Size and time of each picture, so that a changed file changes the fingerprint."""
        names = row.get("images")
        stamps: list[tuple[int, int] | None] = []
        for name in names if _is_list(names) else []:
            try:
                status = (self.folder / str(name)).stat()
                stamps.append((status.st_size, status.st_mtime_ns))
            except OSError:  # reading the row will name what is wrong with it
                stamps.append(None)
        return stamps

    def record(self, number: int) -> Cells:
        cells = super().record(number)
        names = cells.get("images")
        if not _is_list(names):
            raise DataError(f"{self.name}, row {number}, images: expected a list of file names, got {names!r}.")
        return cells | {"images": [self._path(name, f"row {number}, images[{i}]") for i, name in enumerate(names)]}

    def _path(self, name: Any, where: str) -> Path:
        if not isinstance(name, str) or not name:
            raise DataError(f"{self.name}, {where}: expected a file name, got {name!r}.")
        return path_within([self.folder], name, f"{self.name}, {where}")


class ArrowTable(Table):
    """A `datasets.Dataset`: memory-mapped, so that only the rows asked for are read.

    Args:
        dataset: the rows.
        name: how messages name the table.
        folders: of a table that somebody else may have written: where pictures may lie that it names by path.
    """

    def __init__(self, dataset: datasets.Dataset, name: str, folders: Sequence[Path] | None = None) -> None:
        self.dataset, self.name, self.folders = dataset.with_format("arrow"), name, folders
        self.columns = list(dataset.column_names)
        self.fingerprint = getattr(dataset, "_fingerprint", None)
        self._light = self.dataset.select_columns([name for name in self.columns if name not in PICTURES])

    def __len__(self) -> int:
        return len(self.dataset)

    def record(self, number: int) -> Cells:
        cells = self.dataset[number].to_pylist()[0]
        return cells if self.folders is None else pictures_within(self.folders, cells, f"{self.name}, row {number}")

    def outline(self, number: int) -> Cells:
        return self._light[number].to_pylist()[0]

    def outlines(self) -> Iterator[Cells]:
        counts = self._image_counts()
        rows: Iterator[Cells] = (row for part in self._light.iter(1000) for row in part.to_pylist())
        for number, row in enumerate(rows):
            yield row | {"images": counts[number]} if counts else row

    def _image_counts(self) -> list[int | None]:
        """Length of each list of images, from Arrow's offsets alone."""
        if "images" not in self.columns:
            return []
        kind = self.dataset.data.schema.field("images").type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            raise DataError(
                f"{self.name}, column images: expected lists of images, got {kind}. See docs/data-format.md."
            )
        parts = self.dataset.select_columns(["images"]).iter(1000)
        return [count for part in parts for count in pc.list_value_length(part["images"]).to_pylist()]


def path_within(folders: Sequence[Path], name: str, where: str) -> Path:
    """The file that a table names, relative to the first folder.

    Raises:
        DataError: it lies in none of the folders. A table from elsewhere must not pull in other files of this machine.
    """
    path = (folders[0] / name).resolve()
    if not any(path.is_relative_to(folder.resolve()) for folder in folders):
        raise DataError(f"{where}: {name} lies outside the folder of the table. Name pictures inside of it.")
    return path


def pictures_within(folders: Sequence[Path], cells: Cells, where: str) -> Cells:
    """The cells of a row, with each picture that is no more than a path checked by :func:`path_within`."""

    def checked(cell: Any, place: str) -> Any:
        name = (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell
        return path_within(folders, name, f"{where}, {place}") if isinstance(name, str) and name else cell

    changed: Cells = {}
    for column, cell in cells.items():
        if column not in PICTURES:
            continue
        items = [checked(item, f"{column}[{i}]") for i, item in enumerate(cell)] if _is_list(cell) else None
        changed[column] = checked(cell, column) if items is None else items
    return cells | changed


def open_table(source: Any, *, split: str, revision: str | None) -> Table:
    """The table behind whatever the user named.

    Args:
        source: folder of Parquet, image folder, a table file, hub id, `datasets.Dataset` or list of rows.
        split: split to read.
        revision: hub revision.

    Raises:
        DataError: there is no such thing, or it holds no such split.
    """
    if isinstance(source, (datasets.Dataset, datasets.DatasetDict)):
        return _open_dataset(source, split)
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        for number, row in enumerate(source):
            if not isinstance(row, Mapping):
                raise DataError(f"row {number}: expected a dict of cells, got {type(row).__name__}.")
        return ListTable(source)
    if not isinstance(source, (str, Path)):
        raise DataError(
            f"expected a folder, a file, a hub id, a datasets.Dataset or a list of rows, got {type(source).__name__}."
        )
    path = Path(source)
    if not path.exists():
        return _open_hub(str(source), split, revision)
    if revision is not None:
        raise DataError(f"{path} is on this disk, so revision={revision!r} means nothing. Leave it out.")
    table = _open_folder(path, split) if path.is_dir() else _open_file(path, split)
    stored = (path if path.is_dir() else path.parent) / SCORE_RANGES
    if stored.is_file():
        table.score_ranges = _read_ranges(stored)
    return table


def _open_dataset(
    source: datasets.Dataset | datasets.DatasetDict, split: str, folders: Sequence[Path] | None = None
) -> Table:
    if isinstance(source, datasets.Dataset):
        return ArrowTable(source, "the dataset", folders)
    if split not in source:
        raise DataError(f"expected a split named {split!r}, got {', '.join(source)}.")
    return ArrowTable(source[split], f"the split {split!r}", folders)


def _open_folder(folder: Path, split: str) -> Table:
    for place in (folder / split, folder):
        for name in METADATA:
            if (place / name).is_file():
                if place == folder and split != "train":
                    raise DataError(f"{folder} has only the split 'train', got split={split!r}.")
                return _open_metadata(place / name)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _open_dataset(_from_disk(folder), split, [folder])
    if not any(folder.rglob("*.parquet")):
        raise DataError(
            f"{folder} holds neither *.parquet nor {', '.join(METADATA)}: expected a preference table. "
            "See docs/data-format.md."
        )
    patterns = get_data_patterns(str(folder))
    if split not in patterns:
        raise DataError(f"{folder}: expected a split named {split!r}, got {', '.join(map(str, patterns))}.")
    files = DataFilesList.from_patterns(patterns[split], base_path=str(folder), allowed_extensions=[".parquet"])
    return _load_parquet(sorted(map(str, files)), folder, split)


def _from_disk(folder: Path) -> Any:
    """What `save_to_disk` wrote."""
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read as a dataset saved by save_to_disk ({error}).") from error


def _open_file(path: Path, split: str) -> Table:
    if split != "train":
        raise DataError(f"{path} is a single file, which has only the split 'train', got split={split!r}.")
    if path.suffix == ".parquet":
        return _open_metadata(path) if path.name in METADATA else _load_parquet([str(path)], path, split)
    if path.suffix in (".jsonl", ".csv"):
        return FolderTable(path)
    raise DataError(f"{path}: expected a .parquet, .jsonl or .csv table, got {path.suffix or 'no suffix'}.")


def _open_metadata(path: Path) -> Table:
    """A table beside pictures; a metadata.parquet may also carry the pictures themselves."""
    if path.suffix == ".parquet" and not _names_files(path):
        return _load_parquet([str(path)], path, "train")
    return FolderTable(path)


def _names_files(path: Path) -> bool:
    schema = _parquet_schema(path)
    return "images" in schema.names and str(schema.field("images").type).endswith("string>")


def _parquet_schema(path: Path) -> Any:
    try:
        return pq.read_schema(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write it again.") from error


def _load_parquet(files: list[str], source: Path, split: str) -> Table:
    """The table in some files of a folder, or in a single one."""
    for file in files:  # a file cut short is named here, which `datasets` would not do
        _parquet_schema(Path(file))
    try:
        dataset = datasets.load_dataset("parquet", data_files={split: files}, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{source}: cannot be read as one table ({error.__cause__ or error}).") from error
    return ArrowTable(dataset, str(source), [source if source.is_dir() else source.parent])


def _open_hub(name: str, split: str, revision: str | None) -> Table:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise DataError(f"{name}: no such file or folder (and not a hub id of the form owner/name). Check the path.")
    try:
        dataset = datasets.load_dataset(name, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: no such file or folder here, and the hub's dataset of that name cannot be loaded: {error}"
        ) from error
    downloaded = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset")
    table = ArrowTable(dataset, name, [downloaded, datasets.config.DOWNLOADED_DATASETS_PATH])
    try:
        stored = hf_hub_download(name, SCORE_RANGES, repo_type="dataset", revision=revision)
    except EntryNotFoundError:
        return table
    table.score_ranges = _read_ranges(Path(stored))
    return table


def _read_ranges(path: Path) -> dict[str, tuple[float, float]]:
    """``{name: [lowest, highest]}`` of each reward model."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): (float(low), float(high)) for name, (low, high) in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: expected {{name: [lowest, highest]}} of each score, got {error}.") from error


def _read_metadata(path: Path) -> list[Cells]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as bytes, so that quoted line ends of a CSV stay what they are
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error}).") from error
    if path.suffix == ".csv":
        try:
            table = list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise DataError(f"{path}: cannot be read as a table ({error}).") from error
        return [_csv_cells(row, path, number) for number, row in enumerate(table)]
    rows = []
    for line, content in enumerate(text.split("\n"), 1):  # splitlines() would also break texts at U+2028 and others
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {line}: not JSON ({error}). Each line is one row.") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {line}: expected an object of cells, got {type(row).__name__}.")
        rows.append(row)
    return rows


def _csv_cells(row: Mapping[str, Any], path: Path, number: int) -> Cells:
    """Lists in a CSV are separated by semicolons; `scores` is JSON."""
    if None in row or None in row.values():
        raise DataError(
            f"{path}, row {number}: expected as many cells as the header has columns. Quote texts with commas."
        )
    cells: Cells = {}
    for key, text in row.items():
        if key in ("images", "preference", "rank"):
            cells[key] = [part.strip() for part in text.split(";")] if text else None
        elif key in ("scores", "sources"):
            try:
                cells[key] = json.loads(text) if text else None
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, row {number}, {key}: expected JSON, got {text!r} ({error}).") from error
        else:
            cells[key] = text
    return cells


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))

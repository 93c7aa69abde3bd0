"""A table in the forms that other programs read: an image folder with a table, or WebDataset."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

from ..data.files import atomic_file
from ..data.images import image_suffix
from ..data.preferences import PreferenceDataset
from ..data.schema import PreferenceRow
from ..errors import DataError


def export_folder(dataset: PreferenceDataset, folder: str | Path) -> Path:
    """Pictures as files, and ``metadata.jsonl``, which names them; `load_preferences` reads the folder.

    Args:
        dataset: the table.
        folder: made when missing; must not hold one already.

    Returns:
        The written ``metadata.jsonl``; it appears last, when all pictures are there.

    Raises:
        DataError: the folder holds a table already, or cannot be written to; or a picture is none.
    """
    folder = Path(folder)
    table = folder / "metadata.jsonl"
    if table.exists():
        raise DataError(f"{table} is there already. Choose another folder, or remove it.")
    lines = []
    for index, row in enumerate(dataset):
        names = [f"images/{index:07d}-{n}.{suffix}" for n, suffix in enumerate(_suffixes(row))]
        for name, data in zip(names, row.image_bytes, strict=True):
            with atomic_file(folder / name) as file:
                file.write(data)
        lines.append(json.dumps({"images": names, **_cells(row)}, ensure_ascii=False))
    with atomic_file(table) as file:
        file.write(("\n".join(lines) + "\n").encode())
    return table


def export_webdataset(dataset: PreferenceDataset, folder: str | Path, shard_rows: int = 1000) -> list[Path]:
    """Tar files whose samples are ``KEY.0.png``, ``KEY.1.png``, ... and ``KEY.json``.

    Args:
        dataset: the table.
        folder: made when missing; must hold no tar files.
        shard_rows: samples per file.

    Returns:
        The written files; the same table gives the same bytes.

    Raises:
        DataError: there are tar files already, or the folder cannot be written to; or a picture is none.
    """
    folder = Path(folder)
    if any(folder.glob("*.tar")):
        raise DataError(f"{folder} holds tar files already. Choose another folder, or remove them.")
    written = []
    for number in range(math.ceil(len(dataset) / shard_rows)):
        path = folder / f"train-{number:05d}.tar"
        with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for index in range(number * shard_rows, min((number + 1) * shard_rows, len(dataset))):
                row, key = dataset[index], f"{index:09d}"
                for n, (suffix, data) in enumerate(zip(_suffixes(row), row.image_bytes, strict=True)):
                    _add(tar, f"{key}.{n}.{suffix}", data)
                _add(tar, f"{key}.json", json.dumps(_cells(row), ensure_ascii=False).encode())
        written.append(path)
    return written


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def _cells(row: PreferenceRow) -> dict[str, Any]:
    """All of a row but its pictures."""
    record = row.to_record()
    return {key: record[key] for key in ("prompt", "preference", "rank", "sources", "row_id")} | {
        "scores": {entry["name"]: entry["values"] for entry in record["scores"]}
    }


def _suffixes(row: PreferenceRow) -> list[str]:
    return [image_suffix(data, f"{row.where}, images[{n}]") for n, data in enumerate(row.image_bytes)]

"""Pick-a-Pic v2's columns: reading them as rows of two candidates, and writing pairs for other people's scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Features, Value

from ..errors import DataError
from .images import content_hash
from .judgement import as_number
from .schema import PreferenceRow, write_parquet

if TYPE_CHECKING:
    from .pairs import Example
    from .preferences import PreferenceDataset

REQUIRED = ("caption", "jpg_0", "jpg_1", "label_0")
PICKAPIC_FEATURES = Features(
    {
        "caption": Value("string"),
        "jpg_0": Value("binary"),
        "jpg_1": Value("binary"),
        "label_0": Value("float64"),
        "label_1": Value("float64"),
        "has_label": Value("bool"),
        "are_different": Value("bool"),
        "image_0_uid": Value("string"),
        "image_1_uid": Value("string"),
        "best_image_uid": Value("string"),
        "model_0": Value("string"),
        "model_1": Value("string"),
        "num_example_per_prompt": Value("int64"),
    }
)


def from_pickapic(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The cells of our schema from a Pick-a-Pic row.

    Args:
        record: `caption`, `label_0` in {0, 0.5, 1} (0.5 is a tie), and, if there, `jpg_0`, `jpg_1`, `label_1`,
            `model_0`, `model_1`.
        where: named in errors.

    Raises:
        DataError: the labels are no such numbers, or do not add up to 1.
    """
    first = as_number(record.get("label_0"), f"{where}, label_0")
    second = record.get("label_1", 1.0 - first)  # some copies carry label_0 alone
    second = as_number(second, f"{where}, label_1")
    labels = [first, second]
    if not any(map(math.isnan, labels)) and (sorted(labels) not in ([0.0, 1.0], [0.5, 0.5])):
        raise DataError(
            f"{where}: expected label_0 and label_1 of 1 and 0, 0 and 1, or 0.5 twice (a tie), got {first} and "
            f"{second}."
        )
    models = [record.get("model_0"), record.get("model_1")]
    return {
        "prompt": record.get("caption"),
        "images": [record.get("jpg_0"), record.get("jpg_1")],
        "preference": labels,
        "sources": [{"model": model} for model in models] if any(models) else [],
    }


def has_no_label(record: Mapping[str, Any]) -> bool:
    """Whether the annotators left this row undecided (column `has_label`)."""
    return record.get("has_label") is False


def to_pickapic(row: PreferenceRow, candidates: Sequence[int], *, per_prompt: int = 1) -> dict[str, Any]:
    """Two candidates of a row in Pick-a-Pic's columns, in the order in which the row holds them.

    Args:
        row: the row.
        candidates: indices of two of its images.
        per_prompt: how many pairs of this row are written (their column `num_example_per_prompt`).
    """
    first, second = sorted(candidates)
    labels = (0.5, 0.5)
    if row.rank[first] != row.rank[second]:
        labels = (1.0, 0.0) if row.rank[first] < row.rank[second] else (0.0, 1.0)
    uids = [content_hash(row.image_bytes[index]) for index in (first, second)]
    models = [row.sources[index].get("model") if row.sources else None for index in (first, second)]
    return {
        "caption": row.prompt,
        "jpg_0": row.image_bytes[first],
        "jpg_1": row.image_bytes[second],
        "label_0": labels[0],
        "label_1": labels[1],
        "has_label": True,
        "are_different": uids[0] != uids[1],
        "image_0_uid": uids[0],
        "image_1_uid": uids[1],
        "best_image_uid": "tie" if labels[0] == 0.5 else uids[0 if labels[0] == 1.0 else 1],
        "model_0": models[0],
        "model_1": models[1],
        "num_example_per_prompt": per_prompt,
    }


def write_pickapic(
    dataset: PreferenceDataset,
    examples: Iterable[Example],
    folder: str | Path,
    shard_rows: int = 1000,
    *,
    split: str = "train",
) -> list[Path]:
    """Write pairs as a table that scripts made for Pick-a-Pic v2 read.

    Args:
        dataset: where the rows come from.
        examples: pairs from :func:`~diffalign.data.pairs.select_pairs`.
        folder: made when missing; must not hold this split already.
        shard_rows: pairs per file.
        split: first part of the file names.

    Returns:
        The files written.

    Raises:
        DataError: the folder holds this split already, there is no pair, or the disk is full.
    """
    folder, examples = Path(folder), list(examples)
    if sorted(folder.glob(f"{split}-*.parquet")):
        raise DataError(f"{folder} already holds the split {split!r}. Choose another folder or remove it.")
    if not examples:
        raise DataError(f"expected pairs to write into {folder}, got none.")
    per_row: dict[int, int] = {}
    for example in examples:
        per_row[example.row] = per_row.get(example.row, 0) + 1

    def records() -> Iterator[dict[str, Any]]:
        for example in examples:
            yield to_pickapic(dataset[example.row], example.candidates[:2], per_prompt=per_row[example.row])

    stream, written = records(), []
    for number in range(math.ceil(len(examples) / shard_rows)):
        path = folder / f"{split}-{number:05d}.parquet"
        write_parquet(islice(stream, shard_rows), path, PICKAPIC_FEATURES)
        written.append(path)
    return written

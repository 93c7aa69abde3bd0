"""What is in a preference table, and what is wrong with it, row by row."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .images import content_hash, decode_image
from .pickapic import has_no_label
from .preferences import read_outline, require_columns, to_own_columns
from .schema import PreferenceRow, row_id_from_hashes
from .sources import open_table

LONG_PROMPT_WORDS = 75  # CLIP reads 75 tokens, and a word is at least one
SMALLEST_EDGE = 8  # a latent cell of SD and SDXL
MIXED_ASPECT = 1.1  # ratio of aspects beyond which the shared crop costs more than a tenth of an image


@dataclass
class CheckReport:
    """The findings. Row numbers count from 0.

    Args:
        source: what was checked.
        rows: rows in the table.
        usable: rows without an error.
        unlabelled: Pick-a-Pic rows that the annotators left undecided.
        candidates: rows by number of images.
        ties: rows in which all images tie (`all`), in which some do (`some`), and number of tied image pairs (`pairs`).
        scores: by reward model, how many images have a score and how many lack one.
        sizes: images by "height x width", the most frequent first.
        mixed_aspect: rows whose images differ in shape, so that the shared crop cuts more than a tenth off.
        duplicate_images: rows that hold one picture twice.
        duplicate_rows: lists of rows with the same prompt and images.
        prompts: number of different ones, and their least, median and greatest length in words.
        long_prompts: rows with a prompt longer than CLIP can read.
        empty_prompts: rows with an empty prompt.
        stale_row_ids: rows whose row_id is not the hash of their content.
        errors: what is wrong, by row.
    """

    source: str
    rows: int = 0
    usable: int = 0
    unlabelled: int = 0
    candidates: dict[str, int] = field(default_factory=dict)
    ties: dict[str, int] = field(default_factory=lambda: {"all": 0, "some": 0, "pairs": 0})
    scores: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    mixed_aspect: list[int] = field(default_factory=list)
    duplicate_images: list[int] = field(default_factory=list)
    duplicate_rows: list[list[int]] = field(default_factory=list)
    prompts: dict[str, float] = field(default_factory=dict)
    long_prompts: list[int] = field(default_factory=list)
    empty_prompts: list[int] = field(default_factory=list)
    stale_row_ids: list[int] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every row can be used."""
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.rows} rows, {self.usable} usable, {len(self.errors)} with errors, "
            f"{self.unlabelled} without a label",
            f"images per row: {_counts(self.candidates)}",
            f"ties: {self.ties['all']} rows wholly, {self.ties['some']} in part, {self.ties['pairs']} image pairs",
            f"sizes: {_counts(self.sizes)}",
        ]
        if self.prompts:
            lines.append(
                f"prompts: {self.prompts['different']:.0f} different; words: {self.prompts['least']:.0f} to "
                f"{self.prompts['greatest']:.0f}, median {self.prompts['median']:g}"
            )
        for name, score in self.scores.items():
            lines.append(f"score {name}: {score['present']} present, {score['missing']} missing")
        notes = {
            "images of different shapes, cropped to one": self.mixed_aspect,
            "the same picture twice": self.duplicate_images,
            "the same as another row": [row for rows in self.duplicate_rows for row in rows[1:]],
            f"a prompt of more than {LONG_PROMPT_WORDS} words, which CLIP cuts": self.long_prompts,
            "an empty prompt": self.empty_prompts,
            "a row_id that is not the hash of the content": self.stale_row_ids,
        }
        lines += [f"note: {len(rows)} rows with {what}: {_some(rows)}" for what, rows in notes.items() if rows]
        lines += [f"error: {error['message']}" for error in self.errors]
        return "\n".join(lines)


def check_preferences(
    source: str | Path, *, split: str = "train", revision: str | None = None, score: str | None = None
) -> CheckReport:
    """Read a whole table, every image included, and report on it.

    Args:
        source: as for :func:`~diffalign.data.preferences.load_preferences`.
        split: split to read.
        revision: revision of a hub dataset.
        score: reward model that decides, as for `load_preferences`.

    Returns:
        The findings; bad rows are in ``errors``, they raise nothing.

    Raises:
        DataError: there is no table, or a column is missing.
    """
    table = open_table(source, split=split, revision=revision)
    require_columns(table)
    report = CheckReport(source=str(source) if isinstance(source, (str, Path)) else table.name)
    tally = _Tally()
    for number, outline in enumerate(table.outlines()):
        report.rows += 1
        if has_no_label(outline):
            report.unlabelled += 1
            continue
        where = f"row {number}"
        try:
            read_outline(outline, where, score=score)
            cells = to_own_columns(table.record(number), where)
            row = PreferenceRow.from_record(cells, number=number, score=score)
            sizes = _decoded_sizes(row)
        except DataError as error:
            report.errors.append({"row": number, "message": str(error)})
            continue
        report.usable += 1
        _note(report, tally, row, sizes)
    _finish(report, tally)
    return report


class _Tally:
    """What is counted on the way."""

    def __init__(self) -> None:
        self.candidates: Counter[int] = Counter()
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.prompts: set[str] = set()
        self.words: list[int] = []


def _decoded_sizes(row: PreferenceRow) -> list[tuple[int, int]]:
    sizes = []
    for index, data in enumerate(row.image_bytes):
        picture = decode_image(data, f"{row.where}, images[{index}]")
        if min(picture.size) < SMALLEST_EDGE:
            raise DataError(
                f"{row.where}, images[{index}]: {picture.height} x {picture.width} pixels is smaller than a latent "
                f"cell of {SMALLEST_EDGE} x {SMALLEST_EDGE}. Remove the row."
            )
        sizes.append((picture.height, picture.width))
    return sizes


def _note(report: CheckReport, tally: _Tally, row: PreferenceRow, sizes: Sequence[tuple[int, int]]) -> None:
    """Count one usable row."""
    number = row.number or 0
    tally.candidates[len(sizes)] += 1
    tally.sizes.update(sizes)
    hashes = [content_hash(data) for data in row.image_bytes]
    content = row_id_from_hashes(row.prompt, hashes)
    tally.rows.setdefault(content, []).append(number)
    tied = sum(count * (count - 1) // 2 for count in Counter(row.rank).values())
    report.ties["pairs"] += tied
    if tied:
        report.ties["all" if max(row.rank) == 1 else "some"] += 1
    for name, values in row.scores.items():
        score = report.scores.setdefault(name, {"present": 0, "missing": 0})
        missing = sum(map(math.isnan, values))
        score["missing"] += missing
        score["present"] += len(values) - missing
    aspects = [width / height for height, width in sizes]
    words = len(row.prompt.split())
    tally.prompts.add(row.prompt)
    tally.words.append(words)
    for found, where in (
        (max(aspects) / min(aspects) > MIXED_ASPECT, report.mixed_aspect),
        (len(set(hashes)) < len(hashes), report.duplicate_images),
        (words > LONG_PROMPT_WORDS, report.long_prompts),
        (words == 0, report.empty_prompts),
        (row.row_id != content, report.stale_row_ids),
    ):
        if found:
            where.append(number)


def _finish(report: CheckReport, tally: _Tally) -> None:
    report.candidates = {str(count): rows for count, rows in sorted(tally.candidates.items())}
    report.sizes = {f"{height}x{width}": images for (height, width), images in tally.sizes.most_common()}
    report.duplicate_rows = [rows for rows in tally.rows.values() if len(rows) > 1]
    if tally.words:
        report.prompts = {
            "different": len(tally.prompts),
            "least": min(tally.words),
            "median": statistics.median(tally.words),
            "greatest": max(tally.words),
        }


def _counts(counts: dict[str, int], most: int = 12) -> str:
    shown = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:most])
    return shown + (f" and {len(counts) - most} more" if len(counts) > most else "") or "none"


def _some(rows: Sequence[int], most: int = 20) -> str:
    return ", ".join(map(str, rows[:most])) + (f" and {len(rows) - most} more" if len(rows) > most else "")

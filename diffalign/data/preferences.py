"""Loading preference tables: every row is checked at once, its images are read when asked for."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ConfigError, DataError
from ..randomness import keyed_permutation
from .files import atomic_file
from .images import decode_image, image_bytes_of
from .judgement import Judgement, read_judgement, read_scores
from .pickapic import REQUIRED as PICKAPIC
from .pickapic import from_pickapic, has_no_label
from .schema import PreferenceRow, read_image_cells, read_prompt, read_sources, refuse_few
from .sources import SCORE_RANGES, Cells, Table, open_table

log = logging.getLogger(__name__)

OWN = ("prompt", "images")
JUDGEMENTS = ("preference", "rank", "scores")


@dataclass
class LoadReport:
    """What was read and what was left out.

    Args:
        source: what was loaded.
        rows: rows in the table.
        kept: rows in the dataset.
        dropped: number of rows left out, by reason.
        examples: the first message of each reason.
    """

    source: str
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, message: str) -> None:
        """Count one row."""
        self.dropped[reason] += 1
        self.examples.setdefault(reason, message)

    def __str__(self) -> str:
        reasons = "; ".join(
            f"{count} {reason} (first: {self.examples[reason]})" for reason, count in self.dropped.items()
        )
        return f"{self.source}: {self.rows} rows read, {self.kept} kept" + (f", dropped {reasons}" if reasons else "")


class PreferenceDataset:
    """Rows of a preference table, map-style: ``len(dataset)``, ``dataset[i]``.

    Judgements are held in memory (16 bytes an image); prompts and pictures stay where they are until asked for.
    """

    def __init__(
        self,
        table: Table,
        numbers: Sequence[int] | np.ndarray,
        judgements: Iterable[Judgement],
        report: LoadReport,
        score: str | None,
        dealt: Iterable[Sequence[int]] | None = None,
    ) -> None:
        self.report = report
        self._table, self._score = table, score
        self._numbers = np.asarray(numbers, dtype=np.int64)
        preference: list[float] = []
        rank: list[int] = []
        ends = [0]
        for judgement in judgements:
            preference += judgement.preference
            rank += judgement.rank
            ends.append(len(rank))
        self._preference = np.asarray(preference, dtype=np.float64)
        self._rank = np.asarray(rank, dtype=np.int32)
        self._ends = np.asarray(ends, dtype=np.int64)
        self._dealt = None if dealt is None else np.asarray([i for order in dealt for i in order], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> PreferenceRow:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        number = self.number(index)
        where = f"row {number}"
        row = PreferenceRow.from_record(
            to_own_columns(self._table.record(number), where), number=number, score=self._score
        )
        scores = self._deal(index, row.scores)
        return replace(row, preference=self.preference(index), rank=self.rank(index), scores=scores)

    def __iter__(self) -> Iterator[PreferenceRow]:
        return (self[index] for index in range(len(self)))

    def number(self, index: int) -> int:
        """Row number in the table of row ``index`` of the dataset (they differ where rows were dropped)."""
        return int(self._numbers[index])

    def prompt(self, index: int) -> str:
        """The prompt of a row, without reading its images."""
        number = self.number(index)
        return read_prompt(to_own_columns(self._table.outline(number), f"row {number}"), f"row {number}")

    def preference(self, index: int) -> list[float]:
        """Shares of wins of the candidates of a row."""
        return self._preference[self._ends[index] : self._ends[index + 1]].tolist()

    def rank(self, index: int) -> list[int]:
        """Ranks of the candidates of a row; 1 is best, equal ranks are ties."""
        return self._rank[self._ends[index] : self._ends[index + 1]].tolist()

    def scores(self, index: int) -> dict[str, list[float]]:
        """Raw scores of the candidates of a row by reward model, NaN where missing; read without the images."""
        number = self.number(index)
        cells = to_own_columns(self._table.outline(number), f"row {number}")
        return self._deal(index, read_scores(cells.get("scores"), len(self.rank(index)), f"row {number}"))

    def _deal(self, index: int, scores: dict[str, list[float]]) -> dict[str, list[float]]:
        """The table's scores of a row, each where the rest of its judgement is."""
        order = self._order(index)
        return {name: [values[i] for i in order] for name, values in scores.items()}

    def _order(self, index: int) -> Sequence[int]:
        """Whose judgement each candidate of a row has: its own, unless judgements were dealt anew."""
        start, end = self._ends[index], self._ends[index + 1]
        return range(end - start) if self._dealt is None else self._dealt[start:end].tolist()

    def score_range(self, name: str) -> tuple[float, float]:
        """Lowest and highest score of a reward model: as stored with the data set, else over the rows of this one.

        Raises:
            DataError: no row has such a score.
        """
        stored = self._table.score_ranges.get(name)
        if stored is not None:
            return stored
        values = [v for i in range(len(self)) for v in self.scores(i).get(name, []) if not math.isnan(v)]
        if not values:
            known = sorted({key for i in range(min(len(self), 100)) for key in self.scores(i)})
            raise DataError(f"{self.name}: expected scores named {name!r}, got {', '.join(known) or 'none'}.")
        log.info("%s: no stored range of %r; taken from its own %d scores", self.name, name, len(values))
        return min(values), max(values)

    @property
    def name(self) -> str:
        """What was loaded."""
        return self.report.source

    @property
    def fingerprint(self) -> str | None:
        """Equal only for datasets with the same rows and images; None when that would need reading all of them."""
        if self._table.fingerprint is None:
            return None
        return hashlib.blake2b(self._table.fingerprint.encode() + self._numbers.tobytes(), digest_size=12).hexdigest()

    def select(self, indices: Iterable[int]) -> PreferenceDataset:
        """The dataset of these rows."""
        chosen = [range(len(self))[i] for i in indices]  # counts from the end too, and refuses what is not there
        judgements = [Judgement(self.preference(i), self.rank(i), {}) for i in chosen]
        dealt = [self._order(i) for i in chosen]
        return PreferenceDataset(self._table, self._numbers[chosen], judgements, self.report, self._score, dealt)

    def with_shuffled_preferences(self, seed: int) -> PreferenceDataset:
        """The same rows with each row's judgements dealt anew among its images: a control without any signal.

        A judgement is preference, rank and scores together, so that soft labels from scores lose the signal too.
        """
        judgements, dealt = [], []
        for index in range(len(self)):
            preference, rank = self.preference(index), self.rank(index)
            order = keyed_permutation(len(rank), seed, self.number(index), "shuffled preferences")
            judgements.append(Judgement([preference[i] for i in order], [rank[i] for i in order], {}))
            dealt.append([self._order(index)[i] for i in order])
        return PreferenceDataset(self._table, self._numbers, judgements, self.report, self._score, dealt)


def load_preferences(
    source: Any,
    *,
    split: str = "train",
    revision: str | None = None,
    score: str | None = None,
    ties: Literal["drop", "soft"] | None = None,
    bad_rows: Literal["error", "drop"] = "error",
) -> PreferenceDataset:
    """Load a preference table.

    Args:
        source: a folder of Parquet, a Parquet file, an image folder with metadata.jsonl/.csv/.parquet, the id of a hub
            dataset, a `datasets.Dataset`, or a list of rows. The columns are ours or Pick-a-Pic v2's.
        split: split to read.
        revision: revision of a hub dataset.
        score: judge by this reward model's scores instead of `preference` and `rank`.
        ties: ``drop`` leaves out rows in which all images tie. ``soft`` and None keep them: :func:`select_pairs`, which
            sees single pairs, decides.
        bad_rows: ``error`` raises at the first row that cannot be used; ``drop`` leaves such rows out and counts them
            (and decodes every image now to find them).

    Returns:
        The dataset; ``.report`` says what was dropped and why, and is logged.

    Raises:
        DataError: nothing there, a column is missing, or a row cannot be used; names the row and the cell.
    """
    for name, value, allowed in (("ties", ties, (None, "drop", "soft")), ("bad_rows", bad_rows, ("error", "drop"))):
        if value not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}.")
    table = open_table(source, split=split, revision=revision)
    require_columns(table)
    report = LoadReport(source=str(source) if isinstance(source, (str, Path)) else table.name)
    numbers: list[int] = []
    judgements: list[Judgement] = []
    for number, cells in enumerate(table.outlines()):
        report.rows += 1
        if has_no_label(cells):
            report.drop("without a label", f"row {number}")
            continue
        try:
            judgement = read_outline(cells, f"row {number}", score=score)
            if bad_rows == "drop":
                verify_images(table, number)
        except DataError as error:
            if bad_rows == "error":
                raise DataError(f"{report.source}: {error}") from error
            report.drop("unusable", str(error))
            continue
        if ties == "drop" and max(judgement.rank) == 1:
            report.drop("tied", f"row {number}")
            continue
        numbers.append(number)
        judgements.append(judgement)
    report.kept = len(numbers)
    log.log(logging.WARNING if report.dropped else logging.INFO, "%s", report)
    if not numbers:
        raise DataError(f"{report}. Nothing is left to train on.")
    return PreferenceDataset(table, numbers, judgements, report, score)


def store_score_ranges(folder: str | Path) -> dict[str, tuple[float, float]]:
    """Write the range of every score of a table beside it, so that parts and copies of it keep one scale.

    Args:
        folder: a folder of Parquet; ``score_ranges.json`` appears in it.

    Returns:
        (lowest, highest) by reward model.

    Raises:
        DataError: the folder is no table, or cannot be written to.
    """
    table = open_table(Path(folder), split="train", revision=None)
    ranges: dict[str, tuple[float, float]] = {}
    for number, cells in enumerate(table.outlines()):
        for name, values in outline_scores(cells, f"row {number}").items():
            present = [value for value in values if not math.isnan(value)]
            if present:
                low, high = ranges.get(name, (math.inf, -math.inf))
                ranges[name] = (min(low, *present), max(high, *present))
    with atomic_file(Path(folder) / SCORE_RANGES) as file:
        file.write(json.dumps(ranges, indent=1).encode())
    return ranges


def require_columns(table: Table) -> None:
    """Refuse a table that has neither our columns nor Pick-a-Pic's."""
    if len(table) == 0:
        raise DataError(f"{table.name}: expected rows, got an empty table.")
    columns = set(table.columns)
    if columns.issuperset(PICKAPIC) or (columns.issuperset(OWN) and columns.intersection(JUDGEMENTS)):
        return
    pickapic = len(columns.intersection(PICKAPIC)) > len(columns.intersection(OWN))
    missing = [name for name in (PICKAPIC if pickapic else OWN) if name not in columns]
    if not missing:
        missing = ["one of " + ", ".join(JUDGEMENTS)]
    raise DataError(
        f"{table.name}: missing column {', '.join(missing)}; the table has {', '.join(table.columns)}. "
        "Rename or add columns; see docs/data-format.md."
    )


def to_own_columns(cells: Cells, where: str) -> Cells:
    """Cells in our columns, whichever layout they came in."""
    return from_pickapic(cells, where) if "caption" in cells and "images" not in cells else cells


def outline_scores(cells: Cells, where: str) -> dict[str, list[float]]:
    """Raw scores by reward model of a row that came without its pictures, NaN where missing."""
    own = to_own_columns(cells, where)
    count = own["images"] if isinstance(own.get("images"), int) else len(own.get("images") or [])
    return read_scores(own.get("scores"), count, where)


def read_outline(cells: Cells, where: str, *, score: str | None = None) -> Judgement:
    """Check everything about a row but its pictures."""
    cells = to_own_columns(cells, where)
    read_prompt(cells, where)
    count = cells.get("images")
    if isinstance(count, list):
        count = len(count)
    if not isinstance(count, int):
        raise DataError(f"{where}, images: expected a list of at least two images, got {count!r}.")
    refuse_few(count, where)
    read_sources(cells.get("sources"), count, where)
    return read_judgement(cells, count, where, score=score)


def verify_images(table: Table, number: int) -> None:
    """Decode every image of a row, and keep none."""
    where = f"row {number}"
    for index, cell in enumerate(read_image_cells(to_own_columns(table.record(number), where), where)):
        place = f"{where}, images[{index}]"
        decode_image(image_bytes_of(cell, place), place)

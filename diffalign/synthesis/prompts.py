"""Prompts of a run: read from anywhere, normalised, without repeats, split so that no prompt is on both sides."""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow.parquet as pq

from ..errors import ConfigError, DataError
from ..randomness import keyed_uniform
from ..shapes import parse, sample_captions
from .config import GenerationConfig

log = logging.getLogger(__name__)
SHAPES = ("shapes", "shapes:plain")
_SHAPES_SEED = 1000  # as the quickstart's; never the seed of the evaluation sets


@dataclass
class PromptPlan:
    """What a run draws.

    Args:
        train: prompts in order.
        held_out: prompts kept for evaluation.
        dropped: (prompt, reason) of those left out.
    """

    train: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Hash of the training prompts in their order."""
        return hashlib.blake2b("\n".join(self.train).encode(), digest_size=12).hexdigest()

    def __str__(self) -> str:
        reasons = Counter(reason for _, reason in self.dropped)
        left_out = "".join(f", {count} {reason}" for reason, count in reasons.items())
        return f"{len(self.train)} prompts, {len(self.held_out)} held out{left_out}"


def normalise(text: str) -> str:
    """NFC, white space as single spaces, no control characters. Direction marks and joiners mean something and stay."""
    text = unicodedata.normalize("NFC", text)
    text = "".join(letter for letter in text if letter.isspace() or unicodedata.category(letter) != "Cc")
    return " ".join(text.split())


def prompt_key(prompt: str) -> str:
    """Equal for prompts that differ in case, width, spaces or closing punctuation only."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).strip(" .,;:!?")


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt belongs to the held-out part: a matter of its text alone, the same in every run and round."""
    return keyed_uniform("held-out prompt", prompt_key(prompt)) < share


def plan_prompts(config: GenerationConfig) -> PromptPlan:
    """Read, normalise and split the prompts of a run.

    Raises:
        ConfigError: a source does not exist or is of an unknown kind.
        DataError: a source cannot be read, or nothing is left.
    """
    sources = [config.prompts] if isinstance(config.prompts, str) else config.prompts
    excluded = set()
    if config.exclude_prompts is not None:
        excluded = {prompt_key(normalise(text)) for text in _read(config.exclude_prompts, config)}
    plan = PromptPlan()
    seen: set[str] = set()
    for text in (text for source in sources for text in _read(source, config)):
        prompt, key = normalise(text), prompt_key(normalise(text))
        reason = _reason(prompt, key, seen, excluded, config.max_prompt_characters)
        if reason:
            plan.dropped.append((prompt, reason))
            continue
        seen.add(key)
        (plan.held_out if is_held_out(prompt, config.held_out) else plan.train).append(prompt)
        if len(seen) == config.max_prompts:
            break
    if not plan.train:
        raise DataError(f"prompts={config.prompts!r}: expected prompts to draw, got {plan}.")
    return plan


def _reason(prompt: str, key: str, seen: set[str], excluded: set[str], longest: int) -> str:
    """Why a prompt is left out, or nothing."""
    if not key:
        return "empty"
    if any(unicodedata.category(letter) == "Cs" for letter in prompt):
        return "not valid Unicode"
    if len(prompt) > longest:
        return f"longer than {longest} characters"
    if key in excluded:
        return "excluded"
    return "repeated" if key in seen else ""


def _read(source: str, config: GenerationConfig) -> Iterable[str]:
    """Raw prompts of one source, lazily where it may be large."""
    if source in SHAPES:
        return _shapes(source, config)
    path = Path(source)
    readers = {".txt": _text, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.is_file():
        if path.suffix not in readers:
            raise ConfigError(f"prompts: expected a {', '.join(readers)} file, got {path}.")
        return readers[path.suffix](path, config.prompt_column)
    if path.suffix in readers or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ConfigError(f"prompts: {source} is no file, no hub id (owner/name), and none of {', '.join(SHAPES)}.")
    return _hub(source, config)


def _shapes(source: str, config: GenerationConfig) -> list[str]:
    if config.max_prompts is None:
        raise ConfigError(f"prompts={source} has no end: say how many with max_prompts.")
    try:
        found = sample_captions(config.max_prompts, seed=_SHAPES_SEED + config.seed)
    except ValueError as error:
        raise ConfigError(f"max_prompts={config.max_prompts}: {error}") from error
    return found if source == "shapes" else [text for text in found if parse(text).background is None]


def _text(path: Path, column: str) -> list[str]:
    return _decoded(path).split("\n")


def _jsonl(path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: no JSON ({error}).") from error
        yield _cell(item.get(column) if isinstance(item, dict) else item, column, f"{path}, line {number}")


def _csv(path: Path, column: str) -> Iterator[str]:
    rows = csv.DictReader(io.StringIO(_decoded(path), newline=""))
    try:
        _require(column, rows.fieldnames or [], str(path))
        for number, row in enumerate(rows, 1):
            yield _cell(row[column], column, f"{path}, row {number}")
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: no CSV ({error}).") from error


def _parquet(path: Path, column: str) -> Iterator[str]:
    try:
        file = pq.ParquetFile(path)
        _require(column, file.schema_arrow.names, str(path))
        number = 0
        for batch in file.iter_batches(columns=[column]):
            for cell in batch.column(0).to_pylist():
                yield _cell(cell, column, f"{path}, row {number}")
                number += 1
    except DataError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{path}: not a readable Parquet file ({error}).") from error


def _hub(name: str, config: GenerationConfig) -> Iterator[str]:
    """Streams: only what is read is fetched."""
    column = config.prompt_column
    try:
        stream = datasets.load_dataset(name, split=config.prompt_split, revision=config.prompt_revision, streaming=True)
        _require(column, stream.column_names or [column], name)
        for number, row in enumerate(stream.select_columns([column])):
            yield _cell(row[column], column, f"{name}, row {number}")
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"prompts: no file {name} here, and the hub's data set cannot be read: {error}") from error


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts in {path} as UTF-8 text: {error}") from error


def _require(column: str, columns: Iterable[str], where: str) -> None:
    known = list(columns)
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1, cutoff=0.3)
        hint = f" Did you mean prompt_column={near[0]}?" if near else ""
        raise DataError(f"{where}: expected a column {column!r}, got {', '.join(known)}.{hint}")


def _cell(value: object, column: str, where: str) -> str:
    """A missing prompt counts as empty, which is left out and listed; anything but a text is an error."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text in {column!r}, got {value!r}.")
    return value

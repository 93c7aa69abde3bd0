"""Public prompt sets in the file formats their authors publish, and the built-in ones.

Each loader takes the path of a file or folder that the user has; nothing is downloaded.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError, DataError
from ..shapes import parse

RELATIONS = ("left of", "right of", "above", "below")  # positions in GenEval's entries


@dataclass(frozen=True)
class PromptSet:
    """Prompts with what a benchmark knows about them.

    Args:
        name: how reports name the set.
        prompts: P different prompts.
        tasks: P task or category names; None where the set has none.
        items: P benchmark entries for a grader (:mod:`diffalign.evaluation.graders`); None where the set has none.
    """

    name: str
    prompts: list[str]
    tasks: list[str] | None = None
    items: list[Any] | None = None


@dataclass(frozen=True)
class Point:
    """One question of UniGenBench about a picture: its dimension (``Attribute - Color``) and what must hold."""

    dimension: str
    description: str


@dataclass(frozen=True)
class Entry:
    """One prompt of a file, with its task and benchmark entry where the format has them."""

    prompt: str
    task: str | None = None
    item: Any = None


def load_prompt_set(name: str, path: Path) -> list[Entry]:
    """Read a set by name; see :data:`LOADERS`.

    Raises:
        ConfigError: no such file or folder.
        DataError: it has another form, named by place.
    """
    if not path.exists():
        raise ConfigError(f"prompts: {path} does not exist; {name}: takes {LOADERS[name][1]}.")
    try:
        return list(LOADERS[name][0](path))
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path} as UTF-8 text: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error
    except csv.Error as error:
        raise DataError(f"cannot read {path} as a table: {error}.") from error


def collect(name: str, entries: Sequence[Entry], limit: int | None) -> PromptSet:
    """A set from its entries, without repeated prompts.

    With ``limit`` a set that has tasks keeps its first prompts of every task in turn, so that no task is lost.
    """
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.prompt, entry)
    kept = list(first.values())
    if limit is not None and limit < len(kept):
        turns: dict[str | None, int] = {}
        order = []
        for place, entry in enumerate(kept):
            turns[entry.task] = turn = turns.get(entry.task, -1) + 1
            order.append((turn, place))
        chosen = sorted(place for _, place in sorted(order)[:limit])
        kept = [kept[place] for place in chosen]
    tasks = [entry.task for entry in kept]
    items = [entry.item for entry in kept]
    return PromptSet(
        name,
        [entry.prompt for entry in kept],
        None if None in tasks else tasks,  # type: ignore[arg-type]
        None if None in items else items,
    )


def shapes_task(prompt: str) -> str | None:
    """``single``, ``pair`` or ``count`` for a caption of the shapes world."""
    try:
        return parse(prompt).kind
    except ValueError:
        return None


def _parti(path: Path) -> Iterator[Entry]:
    """``PartiPrompts.tsv`` of google-research/parti: Prompt, Category, Challenge, Note; quotes are plain characters."""
    for row, where in _rows(path, delimiter="\t", quoting=csv.QUOTE_NONE):
        yield Entry(_cell(row, where, "Prompt"), _cell(row, where, "Category"))


def _drawbench(path: Path) -> Iterator[Entry]:
    """The CSV of DrawBench's sheet (Saharia et al. 2022): Prompts, Category."""
    for row, where in _rows(path):
        yield Entry(_cell(row, where, "Prompts", "Prompt"), _cell(row, where, "Category"))


def _hpdv2(path: Path) -> Iterator[Entry]:
    """HPDv2: ``benchmark/`` with a JSON list of prompts for each style, one such file, or ``test.json`` with pairs."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    for file in files:
        items = read_json(file.read_text(encoding="utf-8-sig"), str(file))
        if not isinstance(items, list):
            raise DataError(f"{file}: expected a JSON list of prompts, got {type(items).__name__}.")
        for number, item in enumerate(items, 1):
            text = item.get("prompt") if isinstance(item, dict) else item
            yield Entry(_text(text, f"{file}, entry {number}"), file.stem)


def _pickapic(path: Path) -> Iterator[Entry]:
    """Pick-a-Pic's Parquet files (a split such as test_unique): the column ``caption``."""
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        try:
            captions = pq.read_table(file, columns=["caption"])["caption"].to_pylist()
        except (pa.ArrowException, KeyError) as error:
            raise DataError(f"{file}: expected Parquet with the column 'caption': {error}") from error
        yield from (Entry(text) for text in captions if text)


def _geneval(path: Path) -> Iterator[Entry]:
    """``evaluation_metadata.jsonl`` of djghosh13/geneval: tag, include, exclude, prompt."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = read_json(line, where)
        if not isinstance(item, dict) or not isinstance(item.get("include"), list) or "tag" not in item:
            raise DataError(f"{where}: expected an object with tag, include and prompt, got {line[:60]!r}.")
        _check_parts(item, where)
        yield Entry(_text(item.get("prompt"), where), str(item["tag"]), item)


def _check_parts(item: dict[str, Any], where: str) -> None:
    """What a grader will ask of an entry, while no picture is drawn yet."""
    for part in (*item["include"], *item.get("exclude", [])):
        if not isinstance(part, dict) or not isinstance(part.get("class"), str) or type(part.get("count")) is not int:
            raise DataError(f"{where}: expected parts with class and count, got {part!r}.")
    for number, part in enumerate(item["include"]):
        if (position := part.get("position")) is None:
            continue
        if position not in [[relation, earlier] for relation in RELATIONS for earlier in range(number)]:
            raise DataError(f"{where}: expected a position [relation, number of an earlier part], got {position!r}.")


def _dpg(path: Path) -> Iterator[Entry]:
    """``dpg_bench/prompts`` of ELLA: a folder with one prompt in each ``.txt``, ordered by file name."""
    if not path.is_dir():
        raise DataError(f"{path}: expected DPG-Bench's folder of .txt files with one prompt each.")
    for file in sorted(path.glob("*.txt"), key=_natural):
        yield Entry(_text(file.read_text(encoding="utf-8-sig"), str(file)))


def _compbench(path: Path) -> Iterator[Entry]:
    """``examples/dataset`` of T2I-CompBench: ``color_val.txt`` and others, a prompt a line; one file or all.

    Of the folder the ``*_val.txt`` files are read, which hold the parts ``_seen``, ``_unseen``, ``_action`` ... too.
    """
    files = sorted(path.glob("*_val.txt")) if path.is_dir() else [path]
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                yield Entry(_text(line, f"{file}, line {number}"), re.sub(r"_val.*$", "", file.stem))


def _unigenbench(path: Path) -> Iterator[Entry]:
    """``test_prompts_{en,en_long,zh,zh_long}.csv`` of UniGenBench: the prompt, and JSON with its test points."""
    for row, where in _rows(path):
        language = "zh" if "prompt_zh" in row else "en"
        points = read_json(_cell(row, where, f"sub_dims_{language}"), where)
        keys = ("考点", "考点对应描述") if language == "zh" else ("Testpoints", "Testpoint Description")
        dimensions, texts = (points.get(key) if isinstance(points, dict) else None for key in keys)
        if not dimensions or not isinstance(texts, list) or len(dimensions) != len(texts):
            raise DataError(f"{where}: expected as many {keys[0]} as entries of {keys[1]}, got {points!r}.")
        names = [re.sub(r"\s*-\s*", " - ", str(d).strip(), count=1) for d in dimensions]  # Chinese has no blanks
        points_of = [Point(name, str(text)) for name, text in zip(names, texts, strict=True)]
        prompt = _cell(row, where, f"prompt_{language}")
        yield Entry(prompt, None, (prompt, points_of))


#: name -> (loader, what it reads)
LOADERS: dict[str, tuple[Callable[[Path], Iterator[Entry]], str]] = {
    "parti": (_parti, "PartiPrompts.tsv"),
    "hpdv2": (_hpdv2, "HPDv2's benchmark folder of .json files, or one of them, or test.json"),
    "pickapic": (_pickapic, "Parquet of Pick-a-Pic (file or folder)"),
    "drawbench": (_drawbench, "DrawBench's CSV"),
    "geneval": (_geneval, "GenEval's evaluation_metadata.jsonl"),
    "dpg": (_dpg, "DPG-Bench's folder of .txt files"),
    "t2i-compbench": (_compbench, "T2I-CompBench's examples/dataset folder, or one .txt of it"),
    "unigenbench": (_unigenbench, "UniGenBench's test_prompts_*.csv"),
}


def read_json(text: str, where: str) -> Any:
    """Parse JSON; an error names the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}).") from error


def _rows(path: Path, **dialect: Any) -> Iterator[tuple[dict[str, str], str]]:
    text = path.read_text(encoding="utf-8-sig")
    for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), **dialect), 1):
        yield (
            {key: value for key, value in row.items() if key is not None and value is not None},
            f"{path}, row {number}",
        )


def _cell(row: dict[str, str], where: str, *names: str) -> str:
    lowered = {key.strip().lower(): value for key, value in row.items()}
    for name in names:
        if name.lower() in lowered:
            return _text(lowered[name.lower()], f"{where}, {name}")
    raise DataError(f"{where}: expected the column {' or '.join(names)}, got {', '.join(row)}.")


def _text(value: object, where: str) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text:
        raise DataError(f"{where}: expected a text, got {value!r}.")
    return text


def _natural(path: Path) -> tuple[int, str]:
    """Numbered files by their number."""
    return (int(path.stem) if path.stem.isdigit() else 10**9, path.stem)

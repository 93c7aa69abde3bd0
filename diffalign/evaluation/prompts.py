"""Prompts to evaluate on: a list, a file, or a built-in set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from ..shapes import sample_captions
from .prompt_sets import LOADERS, Entry, PromptSet, collect, load_prompt_set, read_json, shapes_task

log = logging.getLogger(__name__)

#: Built-in sets: whether the captions name a combination that no training picture shows.
BUILT_IN = {"shapes:heldout": True, "shapes:seen": False}
BUILT_IN_COUNT = 100
_BUILT_IN_SEED = 90_210  # never used for training prompts, so that results of different runs share their prompts


def read_prompts(source: str | Path | Sequence[str], *, limit: int | None = None) -> list[str]:
    """The prompts of :func:`read_prompt_set` alone."""
    return read_prompt_set(source, limit=limit).prompts


def read_prompt_set(source: str | Path | Sequence[str], *, limit: int | None = None) -> PromptSet:
    """Read prompts, without empty and repeated ones, and what a benchmark knows about them.

    Args:
        source: a list of prompts; ``shapes:heldout`` or ``shapes:seen``; a public set as ``name:path``
            (:data:`diffalign.evaluation.prompt_sets.LOADERS`); or a file: ``.txt`` with a prompt a line,
            ``.jsonl`` with ``{"prompt": ...}`` (or a bare string) a line, ``.json`` with a list of those.
        limit: at most so many, all tasks in turn; of a built-in set, exactly so many (100 when None).

    Raises:
        ConfigError: no such set or file, or a kind of file that is not known.
        DataError: the file has no prompts, or a line that is none.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of prompts must be at least 1, got {limit}.")
    if isinstance(source, str) and source in BUILT_IN:
        try:
            captions = sample_captions(limit or BUILT_IN_COUNT, _BUILT_IN_SEED, held_out=BUILT_IN[source])
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return collect(source, [Entry(text, shapes_task(text)) for text in captions], None)
    where = "the list of prompts"
    name, colon, path = source.partition(":") if isinstance(source, str) else ("", "", "")
    if colon and name in LOADERS:
        where, entries = source, load_prompt_set(name, Path(path).expanduser())  # type: ignore[assignment]
    elif isinstance(source, (str, Path)):
        where, entries = str(source), [Entry(text) for text in _read_file(Path(source))]
    else:
        entries = [Entry(str(prompt)) for prompt in source]
    cleaned = [Entry(text, e.task, e.item) for e in entries if (text := " ".join(e.prompt.split()))]
    found = collect(where, cleaned, limit)
    if not found.prompts:
        raise DataError(f"{where} has no prompts; expected at least one.")
    if limit is None and len(found.prompts) < len(entries):
        log.info("%s: %d of %d prompts kept, others are empty or repeated", where, len(found.prompts), len(entries))
    return found


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        sets = ", ".join(f"{name}:PATH" for name in LOADERS)
        raise ConfigError(
            f"prompts: {path} is neither a file nor one of the built-in sets {', '.join(BUILT_IN)}; "
            f"public sets are given as {sets}."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts in {path} as UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        return text.removesuffix("\n").split("\n")
    if path.suffix == ".jsonl":
        return [_json_prompt(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".json":
        items = read_json(text, str(path))
        if not isinstance(items, list):
            raise DataError(f"{path}: expected a list of prompts, got {type(items).__name__}.")
        return [_prompt(item, f"{path}, entry {n}") for n, item in enumerate(items, 1)]
    sets = ", ".join(f"{name}:PATH" for name in LOADERS)
    raise ConfigError(
        f"prompts: expected a .txt, .jsonl or .json file, got {path.name}; public sets start with {sets}."
    )


def _json_prompt(line: str, where: str) -> str:
    return _prompt(read_json(line, where), where)


def _prompt(item: object, where: str) -> str:
    prompt = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        raise DataError(f'{where}: expected a text or {{"prompt": text}}, got {item!r}.')
    return prompt

"""Prompts to evaluate on: a list, a file, or a built-in set."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from ..shapes import sample_captions

log = logging.getLogger(__name__)

#: Built-in sets: whether the captions name a combination that no training picture shows.
BUILT_IN = {"shapes:heldout": True, "shapes:seen": False}
BUILT_IN_COUNT = 100
_BUILT_IN_SEED = 90_210  # never used for training prompts, so that results of different runs share their prompts


def read_prompts(source: str | Path | Sequence[str], *, limit: int | None = None) -> list[str]:
    """Read prompts, without empty and repeated ones.

    Args:
        source: a list of prompts; ``shapes:heldout`` or ``shapes:seen``; or a file: ``.txt`` with a prompt a line,
            ``.jsonl`` with ``{"prompt": ...}`` (or a bare string) a line, ``.json`` with a list of those.
        limit: at most so many; of a built-in set, exactly so many (100 when None).

    Raises:
        ConfigError: no such set or file, or a kind of file that is not known.
        DataError: the file has no prompts, or a line that is none.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the number of prompts must be at least 1, got {limit}.")
    if isinstance(source, str) and source in BUILT_IN:
        return sample_captions(limit or BUILT_IN_COUNT, _BUILT_IN_SEED, held_out=BUILT_IN[source])
    where = "the list of prompts"
    if isinstance(source, (str, Path)):
        where, found = str(source), _read_file(Path(source))
    else:
        found = [str(prompt) for prompt in source]
    prompts = list(dict.fromkeys(text for prompt in found if (text := " ".join(prompt.split()))))
    if not prompts:
        raise DataError(f"{where} has no prompts; expected at least one.")
    if len(prompts) < len(found):
        log.info("%s: %d of %d prompts kept, the others are empty or repeated", where, len(prompts), len(found))
    return prompts[:limit]


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise ConfigError(f"prompts: {path} is neither a file nor one of the built-in sets {', '.join(BUILT_IN)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompts in {path} as UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        return text.splitlines()
    if path.suffix == ".jsonl":
        return [_json_prompt(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if path.suffix == ".json":
        items = _json(text, str(path))
        if not isinstance(items, list):
            raise DataError(f"{path}: expected a list of prompts, got {type(items).__name__}.")
        return [_prompt(item, f"{path}, entry {n}") for n, item in enumerate(items, 1)]
    raise ConfigError(f"prompts: expected a .txt, .jsonl or .json file, got {path.name}.")


def _json_prompt(line: str, where: str) -> str:
    return _prompt(_json(line, where), where)


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: no JSON ({error}).") from error


def _prompt(item: object, where: str) -> str:
    prompt = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        raise DataError(f'{where}: expected a text or {{"prompt": text}}, got {item!r}.')
    return prompt

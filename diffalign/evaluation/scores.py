"""Scores of pictures, kept on disk so that a stopped evaluation asks no judge twice.

One JSON file for each scorer: its identity, and a value for each (picture bytes, prompt). Another identity (model,
revision or code) starts the file anew; a missing score is not kept, so that it is asked for again.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reward_models import PairwiseRewardModel, RewardModel

from ..data.files import atomic_file
from .pictures import Picture

_SAVE_EVERY = 20.0  # seconds
_AT_ONCE = 64  # pictures between two looks at the clock

Value = float | list[float] | None


class ScoreStore:
    """Values by key, in one file; without a folder, nothing is kept.

    Args:
        folder: of the file.
        name: of the scorer.
        identity: what must be equal for stored values to be used; they are not when its ``code_version`` is unknown.
    """

    def __init__(self, folder: Path | None, name: str, identity: dict[str, Any]) -> None:
        known = identity.get("code_version") is not None
        self.file = folder / f"{re.sub(r'[^0-9A-Za-z._-]', '_', name)}.json" if folder and known else None
        self.identity, self.values = identity, dict[str, Any]()
        if self.file is not None:
            self.values = _stored(self.file, identity)

    def fill(self, keys: Sequence[str | None], ask: Callable[[list[int]], Sequence[Value]]) -> list[Value]:
        """A value for each key, asking only for those that are not stored.

        Args:
            keys: N keys; None is never stored.
            ask: from a list of positions to their values; None is missing.
        """
        result: list[Value] = [self.values.get(key) if key else None for key in keys]
        todo = [i for i, value in enumerate(result) if value is None]
        saved = time.monotonic()
        for start in range(0, len(todo), _AT_ONCE):
            part = todo[start : start + _AT_ONCE]
            for i, value in zip(part, ask(part), strict=True):
                result[i], key = value, keys[i]
                if key is not None and value is not None:
                    self.values[key] = value
            if start + _AT_ONCE >= len(todo) or time.monotonic() - saved > _SAVE_EVERY:
                self._save()
                saved = time.monotonic()
        return result

    def _save(self) -> None:
        if self.file is None:
            return
        with atomic_file(self.file) as file:
            file.write(json.dumps({"identity": self.identity, "values": self.values}).encode())


def score_pictures(
    model: RewardModel, pictures: Sequence[Picture], prompts: Sequence[str], store: ScoreStore | None = None
) -> list[float]:
    """N scores, NaN where missing."""
    store = store or ScoreStore(None, model.name, {})

    def ask(positions: list[int]) -> list[Value]:
        scores = model.score([pictures[i] for i in positions], [prompts[i] for i in positions]).tolist()
        return [None if score != score else score for score in scores]

    keys = [picture_key(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    return [as_float(value) for value in store.fill(keys, ask)]


def judge_pairs(
    judge: PairwiseRewardModel,
    base: Sequence[Picture],
    aligned: Sequence[Picture],
    prompts: Sequence[str],
    store: ScoreStore | None = None,
) -> list[float]:
    """N probabilities that the aligned picture is better, NaN where missing.

    Both orders are asked and averaged: what a judge says because of the place alone cancels. When one order fails the
    pair is missing.
    """
    store = store or ScoreStore(None, judge.name, {})

    def ask(positions: list[int]) -> list[Value]:
        texts = [prompts[i] for i in positions]
        there = judge.compare([(aligned[i], base[i]) for i in positions], texts).tolist()
        back = judge.compare([(base[i], aligned[i]) for i in positions], texts).tolist()
        means = [(p + 1 - q) / 2 for p, q in zip(there, back, strict=True)]
        return [None if mean != mean else mean for mean in means]

    keys = [_pair_key(*three) for three in zip(base, aligned, prompts, strict=True)]
    return [as_float(value) for value in store.fill(keys, ask)]


def picture_key(picture: Picture, prompt: str) -> str | None:
    """What a stored value belongs to; None for pictures that are not on disk."""
    if not isinstance(picture, Path):
        return None
    return hashlib.blake2b(picture.read_bytes() + b"\0" + prompt.encode(), digest_size=12).hexdigest()


def as_float(value: Value) -> float:
    """The value as a number, NaN for a missing one."""
    return float("nan") if value is None or isinstance(value, list) else value


def _pair_key(base: Picture, aligned: Picture, prompt: str) -> str | None:
    first, second = picture_key(base, prompt), picture_key(aligned, prompt)
    return f"{first}-{second}" if first and second else None


def _stored(file: Path, identity: dict[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["values"]) if content["identity"] == identity else {}
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not ours: it is written anew
        return {}

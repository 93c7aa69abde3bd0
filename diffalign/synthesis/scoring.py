"""Scores of candidates from any reward model, pointwise or a judge of pairs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from PIL import Image

from reward_models import RewardModelError, can_score, load_reward_model

from ..data.images import decode_image
from ..errors import ConfigError, DataError
from .candidates import Row
from .config import RewardSpec

_BATCHES = 4  # decoded pictures held at once, in batches of the model


class Scorer:
    """A reward model, ready to judge.

    Args:
        name: of its scores.
        spec: settings.
        device: where a model with weights runs.
        embeds: whether :meth:`distances` will be asked for.

    Raises:
        ConfigError: there is no such model, or it lacks an option.
    """

    def __init__(self, name: str, spec: RewardSpec, device: str, *, embeds: bool = False) -> None:
        self.name = name
        try:
            self.model: Any = load_reward_model(spec.model, device=device, **spec.options)
        except RewardModelError as error:
            raise ConfigError(f"reward_models: {error}") from error
        self.pairs = spec.ask == "pairs" or (spec.ask is None and not can_score(self.model))
        if not hasattr(self.model, "compare" if self.pairs else "score"):
            raise ConfigError(f"reward_models: {name} gives no {spec.ask}; leave `ask` out.")
        if embeds and not hasattr(self.model, "embed"):
            raise ConfigError(f"diversity: {name} has no `embed`; leave it out, or name one such as clip.")

    @property
    def identity(self) -> dict[str, str | None]:
        """What must be equal for two scores to be comparable."""
        return dict(self.model.identity)

    def judge(self, rows: Sequence[Row]) -> tuple[list[list[float]], list[list[float]] | None]:
        """Judge the usable candidates of each row.

        Returns:
            Per row one score per candidate (NaN where unusable or missing), and, of a judge of pairs, its
            probabilities as in :class:`~.candidates.Row`.
        """
        if self.pairs:
            return self._compare(rows)
        places = [(row, number) for row in rows for number in row.usable]
        values = self._in_chunks(
            places,
            lambda chunk: self.model.score(
                [picture(row, number) for row, number in chunk], [row.prompt for row, _ in chunk]
            ),
        )
        scores = [[math.nan] * len(row.candidates) for row in rows]
        found = iter(values)
        for own, row in zip(scores, rows, strict=True):
            for number in row.usable:
                own[number] = next(found)
        return scores, None

    def _compare(self, rows: Sequence[Row]) -> tuple[list[list[float]], list[list[float]]]:
        """All pairs; a candidate's score is its mean probability of being better, missing where one pair is."""
        places = [(row, pair) for row in rows for pair in combinations(row.usable, 2)]
        values = iter(
            self._in_chunks(
                places,
                lambda chunk: self.model.compare(
                    [(picture(row, i), picture(row, j)) for row, (i, j) in chunk], [row.prompt for row, _ in chunk]
                ),
            )
        )
        scores, comparisons = [], []
        for row in rows:
            pairs = {pair: next(values) for pair in combinations(row.usable, 2)}
            own = [math.nan] * len(row.candidates)
            for number in row.usable if len(row.usable) > 1 else []:
                better = [p if pair[0] == number else 1 - p for pair, p in pairs.items() if number in pair]
                own[number] = sum(better) / len(better)
            scores.append(own)
            comparisons.append(list(pairs.values()))
        return scores, comparisons

    def distances(self, rows: Sequence[Row]) -> list[list[float]]:
        """Cosine distances of the usable pictures of each row, by pairs as in :class:`~.candidates.Row`."""
        places = [(row, number) for row in rows for number in row.usable]
        size = int(getattr(self.model, "batch_size", 16))
        parts = [
            self.model.embed([picture(row, number) for row, number in places[start : start + size]]).cpu()
            for start in range(0, len(places), size)
        ]
        found = iter(torch.cat(parts) if parts else ())
        result = []
        for row in rows:
            own = [next(found) for _ in row.usable]
            result.append([1 - float(a @ b) for a, b in combinations(own, 2)])
        return result

    def _in_chunks(self, places: Sequence[Any], ask: Any) -> list[float]:
        """One number for each place; a model of the user's own may answer anything."""
        size = _BATCHES * int(getattr(self.model, "batch_size", 16))
        low, high = (0.0, 1.0) if self.pairs else (-sys.float_info.max, sys.float_info.max)
        wanted = "probabilities from 0 to 1" if self.pairs else "finite scores"
        values: list[float] = []
        for start in range(0, len(places), size):
            chunk = places[start : start + size]
            given = [float(value) for value in ask(chunk)]
            if len(given) != len(chunk):
                raise DataError(f"{self.name}: expected {len(chunk)} numbers, got {len(given)}.")
            if wrong := [value for value in given if not (math.isnan(value) or low <= value <= high)]:
                raise DataError(f"{self.name}: expected {wanted}, got {wrong[0]}.")
            values += given
        return values


def picture(row: Row, number: int) -> Image.Image:
    """A candidate decoded as trainers do: what they will see is what is judged.

    Raises:
        DataError: its bytes are no picture.
    """
    return decode_image(row.candidates[number].data, f"prompt {row.prompt!r:.80}, images[{number}]")

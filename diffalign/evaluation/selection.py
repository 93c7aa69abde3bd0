"""Which pairs of pictures a person is shown."""

from __future__ import annotations

import math

from ..randomness import keyed_permutation
from .compare import Comparison


def random_pairs(comparison: Comparison, count: int) -> list[int]:
    """A fair sample: a fixed shuffle of all pairs, every prompt once before any prompt comes again."""
    seeds = len(comparison.seeds)
    order = keyed_permutation(len(comparison.pairs), "report pictures")
    seen: dict[int, int] = {}
    turn = {}
    for index in order:
        prompt = index // seeds
        turn[index] = seen[prompt] = seen.get(prompt, -1) + 1
    return sorted(order, key=lambda index: turn[index])[:count]


def most_changed(comparison: Comparison, primary: str, count: int, *, better: bool) -> list[int]:
    """The pairs that gained (or lost) most under ``primary``; equal ones are ordered by the other scores.

    Pairs that did not change, changed the other way, or lack a score are never among them.
    """
    sign = 1.0 if better else -1.0
    names = [primary, *(name for name in comparison.results if name != primary)]
    changes = {name: comparison.change(name) for name in names}

    def key(index: int) -> tuple[float, ...]:
        values = (sign * changes[name][index] for name in names)
        return tuple(-math.inf if math.isnan(value) else value for value in values)

    # The fixed shuffle decides what no score decides, so that prompts early in the list are not preferred.
    order = keyed_permutation(len(comparison.pairs), "report pictures")
    return [index for index in sorted(order, key=key, reverse=True) if key(index)[0] > 0][:count]


def most_moved(comparison: Comparison, count: int) -> list[int]:
    """The pairs whose two pictures are farthest apart; equal pictures are never among them."""
    order = sorted(range(len(comparison.moved)), key=lambda index: -comparison.moved[index])
    return [index for index in order if comparison.moved[index] > 0][:count]


def is_verdict(comparison: Comparison, name: str) -> bool:
    """True for a score that says right (1) or wrong (0) and nothing between."""
    values = {v for scores in (comparison.base_scores, comparison.aligned_scores) for v in scores[name] if v == v}
    return bool(values) and values <= {0.0, 1.0}

"""Which candidates of a row are compared: pairs or whole lists, best first, and what happens to ties."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Protocol

from ..errors import ConfigError

log = logging.getLogger(__name__)

PAIRS = ("best_worst", "adjacent", "all")
TIES = ("drop", "soft")


@dataclass(frozen=True)
class Example:
    """What is compared in one visit of a row.

    Args:
        row: index into the dataset.
        candidates: indices of its images, best first.
        probability: that the first is the better one: 1, 1/2 for a tie kept soft, or what scores say.
        preference: shares of wins of the candidates, in their order.
    """

    row: int
    candidates: tuple[int, ...]
    probability: float = 1.0
    preference: tuple[float, ...] = ()

    @property
    def margin(self) -> float:
        """How clear the judgement is: preference of the first above the last."""
        return self.preference[0] - self.preference[-1]

    def reversed(self) -> Example:
        """The same images judged the other way round; how sure the judgement is stays."""
        shares = tuple(1 - share for share in self.preference[::-1])
        return replace(self, candidates=self.candidates[::-1], preference=shares)


class Judged(Protocol):
    """What :func:`select_pairs` needs of a dataset."""

    def __len__(self) -> int: ...
    def preference(self, index: int) -> list[float]: ...
    def rank(self, index: int) -> list[int]: ...


def select_pairs(
    dataset: Judged, *, pairs: str = "best_worst", min_margin: float = 0.0, ties: str = "drop"
) -> tuple[list[Example], dict[str, int]]:
    """The pairs to train on, in the order of the rows.

    A pair is a tie when its ranks are equal. Dropping is the default, since a tie that counts as a win teaches noise.

    Args:
        dataset: rows with `preference` and `rank`.
        pairs: ``best_worst`` one pair a row, ``adjacent`` neighbours in rank, ``all`` k(k-1)/2 pairs.
        min_margin: drop pairs whose preference differs by less than this.
        ties: ``drop``, or ``soft``: keep them with probability 1/2.

    Returns:
        The pairs, and counts: `rows`, `pairs`, `ties_dropped`, `ties_soft`, `below_margin`, `rows_without_pair`.

    Raises:
        ConfigError: an unknown name, a negative margin, or soft ties with a margin that would drop them all.
    """
    _check("pairs", pairs, PAIRS)
    _check("ties", ties, TIES)
    if not 0.0 <= min_margin <= 1.0:
        raise ConfigError(f"min_margin: expected a number from 0 to 1, got {min_margin}.")
    if ties == "soft" and min_margin > 0:
        raise ConfigError(f"ties='soft' keeps ties, min_margin={min_margin} drops every one of them: choose one.")
    counts = Counter(
        dict.fromkeys(("rows", "pairs", "ties_dropped", "ties_soft", "below_margin", "rows_without_pair"), 0)
    )
    examples: list[Example] = []
    for row in range(len(dataset)):
        preference, rank = dataset.preference(row), dataset.rank(row)
        before = len(examples)
        for better, worse in _candidates(rank, pairs):
            tie = rank[better] == rank[worse]
            if tie and ties == "drop":
                counts["ties_dropped"] += 1
            elif preference[better] - preference[worse] < min_margin:
                counts["below_margin"] += 1
            else:
                counts["ties_soft"] += tie
                shares = (preference[better], preference[worse])
                examples.append(Example(row, (better, worse), 0.5 if tie else 1.0, shares))
        counts["rows"] += 1
        counts["rows_without_pair"] += len(examples) == before
    counts["pairs"] = len(examples)
    log.info(
        "%(pairs)d pairs of %(rows)d rows; ties: %(ties_dropped)d dropped, %(ties_soft)d kept soft; "
        "%(below_margin)d below the margin; %(rows_without_pair)d rows give no pair",
        counts,
    )
    return examples, dict(counts)


def select_lists(
    dataset: Judged, *, list_size: int | None = None, min_margin: float = 0.0
) -> tuple[list[Example], dict[str, int]]:
    """The ranked lists to train on, in the order of the rows.

    A list whose images all tie teaches nothing and is dropped; ties within a list stay.

    Args:
        dataset: rows with `preference` and `rank`.
        list_size: keep this many candidates of a longer list: best, worst and evenly spaced ranks between; None keeps
            all.
        min_margin: drop lists whose best and worst differ by less than this.

    Returns:
        The lists, and counts: `rows`, `lists`, `ties_dropped`, `below_margin`.

    Raises:
        ConfigError: a list of fewer than two candidates, or a margin outside [0, 1].
    """
    if list_size is not None and list_size < 2:
        raise ConfigError(f"list_size: a list needs at least two candidates, got {list_size}.")
    if not 0.0 <= min_margin <= 1.0:
        raise ConfigError(f"min_margin: expected a number from 0 to 1, got {min_margin}.")
    counts = Counter(dict.fromkeys(("rows", "lists", "ties_dropped", "below_margin"), 0))
    examples: list[Example] = []
    for row in range(len(dataset)):
        preference, rank = dataset.preference(row), dataset.rank(row)
        order = sorted(range(len(rank)), key=lambda index: rank[index])
        if list_size is not None and len(order) > list_size:
            order = [order[round(i * (len(order) - 1) / (list_size - 1))] for i in range(list_size)]
        counts["rows"] += 1
        if rank[order[0]] == rank[order[-1]]:
            counts["ties_dropped"] += 1
        elif preference[order[0]] - preference[order[-1]] < min_margin:
            counts["below_margin"] += 1
        else:
            examples.append(Example(row, tuple(order), 1.0, tuple(preference[index] for index in order)))
    counts["lists"] = len(examples)
    log.info("%(lists)d lists of %(rows)d rows; %(ties_dropped)d all tied; %(below_margin)d below the margin", counts)
    return examples, dict(counts)


def curriculum(examples: Sequence[Example], stages: int) -> list[list[int]]:
    """Indices of the examples in stages of equal size, the clearest judgements first (Curry-DPO, 2403.07230).

    Args:
        examples: pairs or lists.
        stages: how many; equal margins stay in the order of the rows.

    Raises:
        ConfigError: more stages than examples.
    """
    if stages > len(examples):
        raise ConfigError(f"curriculum_stages={stages} needs at least as many examples, got {len(examples)}.")
    order = sorted(range(len(examples)), key=lambda index: -examples[index].margin)
    edges = [round(i * len(order) / stages) for i in range(stages + 1)]
    return [order[low:high] for low, high in pairwise(edges)]


def _candidates(rank: Sequence[int], pairs: str) -> Iterator[tuple[int, int]]:
    """(better, worse) index pairs; equal ranks keep the order of the row."""
    order = sorted(range(len(rank)), key=lambda index: rank[index])
    if pairs == "best_worst":
        return iter([(order[0], order[-1])])
    return pairwise(order) if pairs == "adjacent" else combinations(order, 2)


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}.{hint}")

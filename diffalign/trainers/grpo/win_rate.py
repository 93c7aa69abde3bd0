"""Win rates: how often each picture of a group beats the others in the eyes of a judge.

A win rate has a fixed scale, so that a group whose pictures are all but equal does not look like one of clear winners
(Pref-GRPO, arXiv:2508.20751). Written from the definition: r_i is the mean over opponents j of P(i beats j).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import ConfigError
from ...randomness import Key, keyed_permutation

SCHEDULES = ("round_robin", "opponents", "tournament")
Pair = tuple[int, int]
#: Ordered pairs of indices -> (n,) probability that the first wins, NaN where there is no judgement.
Ask = Callable[[list[Pair]], Tensor]


@dataclass
class Judgements:
    """What a judge said about one group.

    Args:
        win_rate: (G,) fp64; NaN for a picture none of whose pairs was judged.
        stats: ``calls`` and ``pairs`` asked; as shares of the pairs ``missing``, ``ties`` and, if both orders were
            asked, ``disagreement`` (they name different winners); of the answers ``first_wins``, 1/2 for a judge
            without position bias.
    """

    win_rate: Tensor
    stats: dict[str, float] = field(default_factory=dict)


def win_rates(
    ask: Ask,
    size: int,
    *key: Key,
    schedule: str = "round_robin",
    opponents: int | None = None,
    both_orders: bool = True,
) -> Judgements:
    """Win rates of the pictures of one group.

    Each unordered pair is judged in both orders and p_ij is the mean of P(i wins) over them, so that p_ij + p_ji = 1
    exactly and a judge that prefers a position says nothing. A pair is missing if either order is: half of it would be
    the position's opinion. Ties are 1/2. Without missing pairs the mean of a group is 1/2 whatever the judge says.

    Args:
        ask: the judge.
        size: G pictures.
        key: of the pairing, for schedules that draw one.
        schedule: ``round_robin``: all G (G - 1) / 2 pairs; ``opponents``: a random pairing in which each picture meets
            ``opponents`` others; ``tournament``: ceil(log2 G) rounds in which pictures with like scores meet, G/2 pairs
            a round.
        opponents: of the schedule of that name.
        both_orders: False asks each pair once, in a random order: half the calls, and position bias becomes noise.

    Raises:
        ConfigError: an unknown schedule, or a number of opponents that this group cannot give everyone.
    """
    book = _Book(ask, size, key, both_orders)
    if schedule == "round_robin":
        book.play([(i, j) for i in range(size) for j in range(i + 1, size)])
    elif schedule == "opponents":
        book.play(sparse_pairs(size, opponents or 0, *key))
    elif schedule == "tournament":
        for number in range(math.ceil(math.log2(size))):
            book.play(swiss_round(book.points, book.met, *key, number))
    else:
        raise ConfigError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")
    return book.result()


def sparse_pairs(size: int, opponents: int, *key: Key) -> list[Pair]:
    """Pairs in which each of ``size`` pictures meets exactly ``opponents`` others, in random places on a ring.

    Raises:
        ConfigError: more opponents than others, or an odd number of both, which cannot be paired.
    """
    if not 1 <= opponents < size or size * opponents % 2:
        raise ConfigError(
            f"{opponents} opponents in groups of {size} are impossible: it takes 1 to {size - 1}, and an even product."
        )
    ring = keyed_permutation(size, *key, "ring")
    steps = list(range(1, opponents // 2 + 1)) + [size // 2] * (opponents % 2)
    pairs = {frozenset((ring[i], ring[(i + step) % size])) for step in steps for i in range(size)}
    return sorted((min(pair), max(pair)) for pair in pairs)


def swiss_round(points: Sequence[float], met: set[Pair], *key: Key) -> list[Pair]:
    """Pairs of one round: neighbours in the ranking so far who have not met; with an odd number the last sits out."""
    order = {picture: place for place, picture in enumerate(keyed_permutation(len(points), *key, "round"))}
    waiting = sorted(range(len(points)), key=lambda i: (-points[i], order[i]))
    pairs: list[Pair] = []
    while len(waiting) > 1:
        first = waiting.pop(0)
        fresh = [j for j in waiting if (min(first, j), max(first, j)) not in met]
        second = fresh[0] if fresh else waiting[0]
        waiting.remove(second)
        pairs.append((min(first, second), max(first, second)))
    return pairs


class _Book:
    """Points and counts of a group while its pairs are judged."""

    def __init__(self, ask: Ask, size: int, key: tuple[Key, ...], both_orders: bool) -> None:
        self.ask, self.key, self.both_orders = ask, key, both_orders
        self.points, self.games = [0.0] * size, [0] * size
        self.met: set[Pair] = set()
        self.calls = self.pairs = self.missing = self.ties = self.disagreed = self.answers = 0
        self.firsts = 0.0

    def play(self, pairs: list[Pair]) -> None:
        """Have pairs judged and add up."""
        if not pairs:
            return
        turned = [keyed_permutation(2, *self.key, "order", i, j)[0] == 1 for i, j in pairs]
        if self.both_orders:
            asked = [*pairs, *((j, i) for i, j in pairs)]
        else:
            asked = [(j, i) if turn else (i, j) for (i, j), turn in zip(pairs, turned, strict=True)]
        answers = self.ask(asked).double().tolist()
        self.calls += len(asked)
        found = [answer for answer in answers if not math.isnan(answer)]
        self.answers, self.firsts = self.answers + len(found), self.firsts + math.fsum(found)
        for number, (pair, turn) in enumerate(zip(pairs, turned, strict=True)):
            if self.both_orders:
                forth, back = answers[number], 1 - answers[len(pairs) + number]
                self.disagreed += (forth - 0.5) * (back - 0.5) < 0
                self._count(pair, (forth + back) / 2)
            else:
                self._count(pair, 1 - answers[number] if turn else answers[number])

    def _count(self, pair: Pair, first_wins: float) -> None:
        i, j = pair
        self.met.add(pair)
        self.pairs += 1
        if math.isnan(first_wins):
            self.missing += 1
            return
        self.ties += first_wins == 0.5
        for picture, won in ((i, first_wins), (j, 1 - first_wins)):
            self.points[picture] += won
            self.games[picture] += 1

    def result(self) -> Judgements:
        rates = [p / n if n else math.nan for p, n in zip(self.points, self.games, strict=True)]
        stats = {"calls": float(self.calls), "pairs": float(self.pairs)}
        if self.pairs:
            counts = {"missing": self.missing, "ties": self.ties}
            if self.both_orders:
                counts["disagreement"] = self.disagreed
            stats |= {name: count / self.pairs for name, count in counts.items()}
        if self.answers:
            stats["first_wins"] = self.firsts / self.answers
        return Judgements(torch.tensor(rates, dtype=torch.float64), stats)


def ask_scores(scores: Tensor, tie_margin: float = 0.0) -> Ask:
    """A judge out of scores (G,): the higher one wins; those that differ by no more than ``tie_margin`` are a tie."""

    def ask(pairs: list[Pair]) -> Tensor:
        gap = torch.stack([scores[i] - scores[j] for i, j in pairs]).double()
        won = 0.5 + 0.5 * torch.sign(gap) * (gap.abs() > tie_margin)
        return torch.where(gap.isnan(), gap, won)

    return ask

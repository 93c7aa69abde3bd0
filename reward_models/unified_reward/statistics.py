"""What a judge did so far: how often it failed, tied, contradicted itself, or followed the order of the pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class JudgeStatistics:
    """Counts since the last :meth:`reset`. Rates are NaN before there is anything to divide by."""

    answers: int = 0
    """Questions that were put to the model, or should have been; what was answered before is not counted."""
    asked_again: int = 0
    """Questions asked a second time because the first answer could not be read."""
    failures: Counter[str] = field(default_factory=Counter)
    """Questions left without a usable answer, by reason."""
    inconsistent: int = 0
    """Answers whose own sums speak against their verdict."""
    scores: int = 0
    scores_missing: int = 0
    pairs: int = 0
    pairs_missing: int = 0
    """Pairs without a judgement: an answer was missing in at least one order."""
    identical: int = 0
    """Pairs of twice the same picture: a tie, without asking."""
    judged: int = 0
    """Pairs that were answered in both orders."""
    agreed: int = 0
    """Judged pairs on which both orders name the same picture, or tie."""
    reversed: int = 0
    """Judged pairs on which the two orders name opposite pictures."""
    tied_answers: int = 0
    """Answers about judged pairs that name no picture, of ``2 * judged``."""
    lean: float = 0.0
    """Sum over judged pairs of how much the picture shown first is preferred to the one shown second, in [-1, 1]."""

    def add_pair(self, first_order: float, second_order: float) -> None:
        """Count a pair judged in both orders, each given as the share of the picture then shown first."""
        self.judged += 1
        sides = (_side(first_order), -_side(second_order))  # of the pair's first picture
        self.agreed += sides[0] == sides[1]
        self.reversed += sides[0] * sides[1] < 0
        self.tied_answers += sides.count(0)
        self.lean += first_order + second_order - 1

    @property
    def agreement(self) -> float:
        """Share of judged pairs on which both orders agree."""
        return _rate(self.agreed, self.judged)

    @property
    def position_bias(self) -> float:
        """From -1 (always the picture shown second) over 0 (no preference for a place) to 1 (always the first)."""
        return _rate(self.lean, self.judged)

    @property
    def tie_rate(self) -> float:
        """Share of answers about judged pairs that name no picture."""
        return _rate(self.tied_answers, 2 * self.judged)

    @property
    def missing_rate(self) -> float:
        """Share of pairs and scores that are missing."""
        return _rate(self.pairs_missing + self.scores_missing, self.pairs + self.scores)

    @property
    def follows_position(self) -> bool:
        """Whether the judge says little but where a picture was shown: |position bias| of 0.9 and more."""
        return self.judged > 0 and abs(self.position_bias) >= 0.9

    def reset(self) -> None:
        """Start again from nothing."""
        self.__init__()  # type: ignore[misc]

    def as_dict(self) -> dict[str, Any]:
        """All counts and rates, for logs and reports."""
        counts = {key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self).items()}
        rates = ("agreement", "position_bias", "tie_rate", "missing_rate", "follows_position")
        return counts | {rate: getattr(self, rate) for rate in rates}


def _side(share: float) -> int:
    return (share > 0.5) - (share < 0.5)


def _rate(part: float, whole: int) -> float:
    return part / whole if whole else float("nan")

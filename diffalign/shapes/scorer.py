"""The shapes checker as two reward models."""

from __future__ import annotations

from abc import abstractmethod

from PIL import Image

from reward_models.base import BaseRewardModel, source_hash

from . import checker, grammar
from .checker import Verdict, check
from .grammar import parse

_STRICT_BONUS = 0.3


class _CheckerScore(BaseRewardModel):
    """Runs the checker; NaN when the prompt is not a caption of the shapes world."""

    @property
    def identity(self) -> dict[str, str | None]:
        """The checker has no weights: its version is the hash of its source."""
        return {"id": self.name, "revision": None, "code_version": source_hash(grammar, checker, type(self))}

    @abstractmethod
    def value(self, verdict: Verdict) -> float:
        """The score of one verdict."""

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        return [self._one(image, prompt) for image, prompt in zip(images, prompts, strict=True)]

    def _one(self, image: Image.Image, prompt: str) -> float | None:
        try:
            caption = parse(prompt)
        except ValueError:  # another world's prompt: no judgement, which is not a bad score
            return None
        return self.value(check(image, caption))


class ShapesScorer(_CheckerScore):
    """``soft + 0.3 * strict``, in [0, 1.3]: the share of the caption's claims that hold, and a bonus when all do.

    The bonus widens the gap between a picture that is right and one that is almost right.
    """

    name = "shapes"

    def value(self, verdict: Verdict) -> float:
        return verdict.soft + _STRICT_BONUS * verdict.strict


class ShapesStrictScorer(_CheckerScore):
    """1.0 when every claim of the caption holds, else 0.0."""

    name = "shapes-strict"

    def value(self, verdict: Verdict) -> float:
        return float(verdict.strict)

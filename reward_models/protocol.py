"""What a reward model is. Anything with these members can be used wherever a reward model is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor


@runtime_checkable
class RewardModel(Protocol):
    """Scores pictures one at a time."""

    @property
    def name(self) -> str:
        """Short name under which its scores are stored."""
        ...

    @property
    def identity(self) -> dict[str, str | None]:
        """What must be equal for two scores to be comparable: ``id``, ``revision`` and ``code_version``."""
        ...

    def score(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """Score each picture under its prompt.

        Args:
            images: N pictures in any form :func:`reward_models.to_pil` reads.
            prompts: N prompts.

        Returns:
            (N,) fp32 on the CPU, larger is better; NaN is a missing score and never stands for a bad one.
        """
        ...


@runtime_checkable
class PairwiseRewardModel(Protocol):
    """Judges two pictures against each other."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, str | None]: ...

    def compare(self, pairs: Sequence[tuple[Any, Any]], prompts: Sequence[str]) -> Tensor:
        """(N,) fp32: the probability that the first of each pair is better; NaN where there is no judgement."""
        ...


def can_score(model: RewardModel | PairwiseRewardModel) -> TypeGuard[RewardModel]:
    """Whether a model scores pictures one at a time; some judges have the method but no question for it."""
    return isinstance(model, RewardModel) and not getattr(model, "pairs_only", False)

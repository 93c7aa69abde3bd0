"""A beta that follows the training: strong while pairs still teach, weaker when they are all told apart."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .base import check_positive


class AdaptiveBeta:
    """Moves beta so that the mean gradient factor stays near a target.

    The gradient factor of a pair is sigmoid(-g), with the logit g = beta * (improvement of the gap) / 2: 1/2 where the
    policy equals its reference, towards 0 where the pair is told apart and no longer pulls. A larger beta makes the
    same improvement count for more, so:

    - factor below the target (saturated): **lower** beta; the pairs pull again;
    - factor between target and 1/2: **raise** beta; the same pairs are told apart closer to the reference;
    - factor at 1/2 or above: hold. At the start beta has no influence on it, and where the average pair is ranked
      wrongly a larger beta would drive the factor up, away from the target.

    The step is ``log beta += rate * (smoothed factor - target)``, then beta is clipped to its bounds. For pairs that
    are ranked correctly the factor falls with log beta, by at most 0.224 per unit: with the default rate and
    smoothing the loop settles without overshoot.

    This is about the sigmoid loss: the minimum of IPO and hinge is a logit of its own, which no beta moves, and beta
    would run to a bound. So it would with a target that conservative label smoothing keeps out of reach.

    Lowering beta takes away what holds the policy to its reference: ``minimum`` is the brake, and a run that stays
    there has learnt its pairs. Implicit rewards scale with beta, so log it with them.

    The rule is ours and as plain as a controller can be; no published result stands behind its defaults. Relatives:
    beta-DPO (Wu et al. 2024, arXiv:2407.08639) sets beta per batch from the reward gap of its pairs; SimpleTuner's
    flow DPO has an automatic beta with a target gradient factor.

    Args:
        beta: to start with.
        target: mean gradient factor to move to, in (0, 1/2).
        rate: change of log beta per update and unit of factor.
        minimum: lower bound; None means a tenth of ``beta``.
        maximum: upper bound; None means ten times ``beta``.
        smoothing: weight of the past in the running mean of the factor, in [0, 1).

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        beta: float = 5000.0,
        *,
        target: float = 0.3,
        rate: float = 0.02,
        minimum: float | None = None,
        maximum: float | None = None,
        smoothing: float = 0.9,
    ) -> None:
        check_positive("beta", beta)
        check_positive("rate", rate)
        if not 0 < target < 0.5:
            raise ValueError(f"target must lie between 0 and 1/2, the factor of an untrained policy; got {target!r}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1); got {smoothing!r}.")
        self.minimum = beta / 10 if minimum is None else minimum
        self.maximum = beta * 10 if maximum is None else maximum
        if not 0 < self.minimum <= beta <= self.maximum < math.inf:
            raise ValueError(
                f"expected 0 < minimum <= beta <= maximum; got minimum={self.minimum!r}, beta={beta!r}, "
                f"maximum={self.maximum!r}."
            )
        self.target, self.rate, self.smoothing = target, rate, smoothing
        self.beta = float(beta)
        self.factor: float | None = None  # the running mean; None before the first update

    def update(self, gradient_factor: float) -> float:
        """Take in the mean factor of a step and return the beta of the next one.

        Args:
            gradient_factor: mean over the global batch, the same number on every process; the caller reduces it.

        Raises:
            ValueError: a factor outside [0, 1] or NaN.
        """
        if not 0 <= gradient_factor <= 1:
            raise ValueError(f"gradient_factor must lie in [0, 1]; got {gradient_factor!r}.")
        past = gradient_factor if self.factor is None else self.factor
        self.factor = self.smoothing * past + (1 - self.smoothing) * gradient_factor
        if self.factor < 0.5:
            beta = self.beta * math.exp(self.rate * (self.factor - self.target))
            self.beta = min(max(beta, self.minimum), self.maximum)
        return self.beta

    def state_dict(self) -> dict[str, float | None]:
        """What a checkpoint must hold; bounds and target belong to the configuration."""
        return {"beta": self.beta, "factor": self.factor}

    def load_state_dict(self, state: Mapping[str, float | None]) -> None:
        """Continue where :meth:`state_dict` was taken.

        Raises:
            ValueError: an entry is missing, or the saved beta lies outside this one's bounds.
        """
        beta, factor = state.get("beta"), state.get("factor")
        if beta is None or "factor" not in state:
            raise ValueError(f"expected the entries beta and factor in the state; got {sorted(state)}.")
        if not self.minimum <= beta <= self.maximum:
            raise ValueError(
                f"the saved beta {beta!r} lies outside [{self.minimum!r}, {self.maximum!r}]: "
                "continue with the bounds of the run that saved it."
            )
        self.beta, self.factor = float(beta), factor

"""What every objective returns, and the checks they share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class LossOutput:
    """Result of an objective.

    Args:
        loss: (B,) one value per prompt, unreduced and differentiable.
        stats: detached (B,) tensors to log, by name.
    """

    loss: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


def check_errors(policy_error: Tensor, reference_error: Tensor | None = None, *, width: int | None = 2) -> None:
    """Refuse matrices of denoising errors that an objective cannot mean.

    Args:
        policy_error: (B, k) squared errors, fp32 or wider.
        reference_error: same shape, or None for methods without a reference.
        width: required k; None allows any k >= 1.

    Raises:
        ValueError: wrong shape or a half-precision dtype.
    """
    if policy_error.ndim != 2 or policy_error.shape[1] < 1 or (width is not None and policy_error.shape[1] != width):
        expected = f"(B, {width})" if width is not None else "(B, k) with k >= 1"
        raise ValueError(f"policy_error must have shape {expected}, winner first; got {tuple(policy_error.shape)}.")
    for name, error in (("policy_error", policy_error), ("reference_error", reference_error)):
        if error is None:
            continue
        if error.shape != policy_error.shape:
            raise ValueError(
                f"{name} must have the shape of policy_error, {tuple(policy_error.shape)}; got {tuple(error.shape)}."
            )
        if error.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64, got {error.dtype}: beta multiplies differences of errors by "
                "thousands, which half precision cannot hold. Cast predictions to float32 before the subtraction."
            )


def check_positive(name: str, value: float) -> None:
    """Refuse a scale that is zero, negative, infinite or NaN."""
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0; got {value!r}.")


def check_probability(probability: Tensor, logit: Tensor) -> Tensor:
    """The probabilities in the dtype of ``logit``, both (B,).

    Raises:
        ValueError: another shape, or a value outside [0, 1] (NaN included), whose index is named.
    """
    if probability.shape != logit.shape:
        raise ValueError(f"probability must have shape {tuple(logit.shape)}; got {tuple(probability.shape)}.")
    check_unit("probability", probability)
    return probability.to(logit.dtype)


def check_unit(name: str, values: Tensor) -> None:
    """Refuse values outside [0, 1], NaN included; the message names the first one's index."""
    bad = ~((values >= 0) & (values <= 1))
    if bool(bad.any()):
        index = tuple(bad.nonzero()[0].tolist())
        place = ", ".join(map(str, index))
        raise ValueError(f"{name} must lie in [0, 1]; {name}[{place}] is {values[index].item()}.")


def option(name: str, value: Value | None, default: Value, *, read: bool, reader: str) -> Value:
    """A parameter that only some variants read: the value, or its default when it is None.

    Args:
        name: of the parameter, for the message.
        value: what the caller passed; None means "the default".
        default: what None stands for.
        read: whether the variant asked for reads this parameter.
        reader: who does, for the message.

    Raises:
        ValueError: a value was passed that nothing would read.
    """
    if value is None:
        return default
    if not read:
        raise ValueError(f"{name}={value!r} would have no effect: only {reader} reads it. Leave it out.")
    return value


def correct(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 1/2 at a tie, 0 elsewhere."""
    return (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)

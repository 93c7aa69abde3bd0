"""What every objective returns, and the checks they share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


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
    if policy_error.ndim != 2 or (width is not None and policy_error.shape[1] != width):
        expected = f"(B, {width})" if width is not None else "(B, k)"
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

"""Supervised fine-tuning on the winner: the control that every preference method must beat."""

from __future__ import annotations

from torch import Tensor

from .base import LossOutput, check_errors


def sft_loss(policy_error: Tensor) -> LossOutput:
    """The winner's own denoising error; the loser is ignored.

    Args:
        policy_error: (B, k) squared error, mean over C, H, W; best image first.

    Returns:
        Per-prompt loss (B,) and the stats ``error/winner`` and ``error/loser`` (the last image's).
    """
    check_errors(policy_error, width=None)
    return LossOutput(
        policy_error[:, 0],
        {"error/winner": policy_error[:, 0].detach(), "error/loser": policy_error[:, -1].detach()},
    )

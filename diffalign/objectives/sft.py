"""Supervised fine-tuning on the winner: the control that every preference method must beat, and a term beside one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import LossOutput, check_errors, check_probability
from .rankdpo import best_weights, check_preference


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


def with_sft(
    out: LossOutput,
    policy_error: Tensor,
    weight: float,
    *,
    preference: Tensor | None = None,
    probability: Tensor | None = None,
) -> LossOutput:
    """Add fine-tuning on the winner to any objective: loss + weight * winner's error.

    It anchors the winner: a preference loss only sees gaps and is content when both errors rise (displacement). The
    counterpart for denoising errors of the likelihood term beside DPO in language models: Pang et al. 2024
    (arXiv:2404.19733) and Liu et al. 2024 (RPO, arXiv:2405.16436).

    The weight has to be seen beside beta: DPO's pull on an error starts at beta/4, 1250 for beta = 5000. A weight of 1
    is then nothing; beta/40 (125) is a tenth of the pull at the start and outweighs it below a gradient factor of 0.05.

    Args:
        out: of any objective on the same errors.
        policy_error: (B, k) the errors that went into it, with gradient.
        weight: of the winner's error, 0 or above.
        preference: (B, k) which image is the winner, the highest (several tied ones share the weight).
        probability: (B,) of pairs, in place of ``preference``: the winner is the first image above 1/2, the second
            below, and none at 1/2. With neither the winner is the first.

    Returns:
        The sum (B,), and the stats of ``out`` with ``loss/preference`` (before the sum) and ``loss/sft`` (what was
        added).

    Raises:
        ValueError: a negative or non-finite weight, shapes that do not belong together, values outside [0, 1], or both
            ``preference`` and ``probability``.
    """
    check_errors(policy_error, width=None)
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be a finite number, 0 or above; got {weight!r}.")
    if out.loss.shape != policy_error.shape[:1]:
        raise ValueError(
            f"policy_error has {policy_error.shape[0]} rows but the loss has shape {tuple(out.loss.shape)}: "
            "pass the errors that the loss was computed from."
        )
    if preference is not None and probability is not None:
        raise ValueError("preference and probability both say which image is the winner: pass one of them.")
    if preference is not None:
        winner = (best_weights(check_preference(preference, policy_error)) * policy_error).sum(1)
    elif probability is not None:
        check_errors(policy_error)
        p = check_probability(probability, policy_error[:, 0])
        winner = (torch.stack((p > 0.5, p < 0.5), 1) * policy_error).sum(1)
    else:
        winner = policy_error[:, 0]
    term = weight * winner
    return LossOutput(out.loss + term, {**out.stats, "loss/preference": out.loss.detach(), "loss/sft": term.detach()})

"""Diffusion-DPO: prefer the winner over the loser, measured against a reference model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LossOutput, check_errors

LOSS_TYPES = ("sigmoid", "hinge", "ipo")


def dpo_loss(
    policy_error: Tensor,
    reference_error: Tensor,
    *,
    beta: float = 5000.0,
    loss_type: str = "sigmoid",
    probability: Tensor | None = None,
) -> LossOutput:
    """Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908, Eq. 14; scale as in the authors' code).

    Notation: policy_error -> l_w, l_l; reference_error -> r_w, r_l.

    1. implicit reward of each image     rho = -beta/2 (l - r)
    2. logit of the pair                 g   = rho_w - rho_l
    3. ``sigmoid``                       -log sigmoid(g)
       ``hinge`` (SLiC, 2305.10425)      max(0, 1 - g)
       ``ipo`` (Azar et al. 2310.12036)  (g - 1/2)^2, whose target margin is beta-free in this scale

    Where the policy equals the reference the sigmoid loss is ln 2 but its gradient is not zero: it is +beta/4 for the
    winner's error and -beta/4 for the loser's.

    Args:
        policy_error: (B, 2) squared error, mean over C, H, W; winner first; fp32 or fp64.
        reference_error: (B, 2) the same with the reference model.
        beta: strength of the pull to the reference, in the convention above (mean over C, H, W and a factor 1/2).
        loss_type: ``sigmoid``, ``hinge`` or ``ipo``.
        probability: (B,) probability that the first image really is the better one; None means 1. With 1/2 the pair
            is a tie and pulls both images equally.

    Returns:
        Per-pair loss (B,) and the stats ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``,
        ``rewards/accuracies`` (a tie counts 1/2), ``gradient_factor`` (share of the largest possible gradient),
        ``error/winner_change`` and ``error/loser_change`` (policy minus reference).

    Raises:
        ValueError: wrong shapes, half precision, unknown ``loss_type``, or a probability outside [0, 1].
    """
    check_errors(policy_error, reference_error)
    change = policy_error - reference_error
    reward = -0.5 * beta * change
    logit = reward[:, 0] - reward[:, 1]
    loss = _pair_loss(logit, loss_type)
    if probability is not None:
        probability = _checked_probability(probability, logit)
        loss = probability * loss + (1 - probability) * _pair_loss(-logit, loss_type)
    margin = logit.detach()
    stats = {
        "rewards/chosen": reward[:, 0].detach(),
        "rewards/rejected": reward[:, 1].detach(),
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype),
        "gradient_factor": torch.sigmoid(-margin),
        "error/winner_change": change[:, 0].detach(),
        "error/loser_change": change[:, 1].detach(),
    }
    return LossOutput(loss, stats)


def _pair_loss(logit: Tensor, loss_type: str) -> Tensor:
    if loss_type == "sigmoid":
        return -F.logsigmoid(logit)
    if loss_type == "hinge":
        return torch.relu(1 - logit)
    if loss_type == "ipo":
        return (logit - 0.5).square()
    raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}.")


def _checked_probability(probability: Tensor, logit: Tensor) -> Tensor:
    if probability.shape != logit.shape:
        raise ValueError(f"probability must have shape {tuple(logit.shape)}; got {tuple(probability.shape)}.")
    if not bool(((probability >= 0) & (probability <= 1)).all()):
        raise ValueError(f"probability must lie in [0, 1]; got {probability.tolist()}.")
    return probability.to(logit.dtype)

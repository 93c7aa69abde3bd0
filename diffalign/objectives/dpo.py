"""Diffusion-DPO: prefer the winner over the loser, measured against a reference model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LossOutput, check_errors, check_positive, check_probability, correct

LOSS_TYPES = ("sigmoid", "hinge", "ipo")
SMOOTHINGS = ("conservative", "robust")


def dpo_loss(
    policy_error: Tensor,
    reference_error: Tensor,
    *,
    beta: float = 5000.0,
    loss_type: str = "sigmoid",
    probability: Tensor | None = None,
    label_smoothing: float = 0.0,
    smoothing: str = "conservative",
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

    Labels that may be wrong: with L(g) the loss of step 3, q the weight of the label as it stands and p the
    ``probability`` (1 without one), the loss is q L(g) + (1 - q) L(-g), and with eps = ``label_smoothing``

    - ``conservative`` (cDPO: Mitchell 2023, https://ericmitchell.ai/cdpo.pdf): q = p (1 - eps) + (1 - p) eps. The
      labels are believed only so far: beyond the margin log((1 - eps) / eps) the pair is pulled back.
    - ``robust`` (rDPO: Chowdhury et al. 2403.00409): q = (p - eps) / (1 - 2 eps). If a share eps of the labels is
      flipped, the mean over flips is exactly the loss on the true labels. It has no lower bound: every pair keeps a
      pull of at least eps / (1 - 2 eps), so stop by steps or learning rate.

    Args:
        policy_error: (B, 2) squared error, mean over C, H, W; winner first; fp32 or fp64.
        reference_error: (B, 2) the same with the reference model.
        beta: strength of the pull to the reference, in the convention above (mean over C, H, W and a factor 1/2).
        loss_type: ``sigmoid``, ``hinge`` or ``ipo``.
        probability: (B,) probability that the first image really is the better one; None means 1. With 1/2 the pair
            is a tie and pulls both images equally.
        label_smoothing: eps, the share of labels thought to be wrong, in [0, 1/2); 0 is plain DPO in both forms.
        smoothing: ``conservative`` or ``robust``; any loss type.

    Returns:
        Per-pair loss (B,) and the stats ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``,
        ``rewards/accuracies`` (a tie counts 1/2), ``gradient_factor`` (sigmoid(-g): 1/2 at the start, 0 where a pair is
        told apart), ``error/winner_change`` and ``error/loser_change`` (policy minus reference).

    Raises:
        ValueError: wrong shapes, half precision, an unknown ``loss_type`` or ``smoothing``, a probability outside
            [0, 1], or a smoothing outside [0, 1/2).
    """
    check_errors(policy_error, reference_error)
    reward = implicit_reward(policy_error, reference_error, beta)
    logit = reward[:, 0] - reward[:, 1]
    loss = pair_loss(logit, loss_type)
    weight = _label_weight(logit, probability, label_smoothing, smoothing)
    if weight is not None:
        loss = weight * loss + (1 - weight) * pair_loss(-logit, loss_type)
    return LossOutput(loss, pair_stats(reward, logit, policy_error - reference_error))


def implicit_reward(policy_error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """rho = -beta/2 (l - r) of every image (B, k): positive where the policy denoises it better than the reference."""
    check_positive("beta", beta)
    return -0.5 * beta * (policy_error - reference_error)


def pair_loss(logit: Tensor, loss_type: str = "sigmoid") -> Tensor:
    """Loss of a logit, elementwise: small where it is positive."""
    if loss_type == "sigmoid":
        return -F.logsigmoid(logit)
    if loss_type == "hinge":
        return torch.relu(1 - logit)
    if loss_type == "ipo":
        return (logit - 0.5).square()
    raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}; got {loss_type!r}.")


def pair_stats(reward: Tensor, logit: Tensor, change: Tensor) -> dict[str, Tensor]:
    """What to log of pairs.

    Args:
        reward: (B, 2) implicit rewards, winner first.
        logit: (B,) what the loss was taken of.
        change: (B, 2) policy error minus reference error.
    """
    reward, change = reward.detach(), change.detach()
    margin = reward[:, 0] - reward[:, 1]
    return {
        "rewards/chosen": reward[:, 0],
        "rewards/rejected": reward[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": correct(margin),
        "gradient_factor": torch.sigmoid(-logit.detach()),
        "error/winner_change": change[:, 0],
        "error/loser_change": change[:, 1],
    }


def _label_weight(logit: Tensor, probability: Tensor | None, eps: float, smoothing: str) -> Tensor | None:
    """q of :func:`dpo_loss`, (B,); None where every label is certain."""
    if not 0 <= eps < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), the share of wrong labels; got {eps!r}.")
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing must be one of {', '.join(SMOOTHINGS)}; got {smoothing!r}.")
    if probability is None and eps == 0:
        return None
    p = torch.ones_like(logit) if probability is None else check_probability(probability, logit)
    if smoothing == "conservative":
        return p * (1 - eps) + (1 - p) * eps
    return (p - eps) / (1 - 2 * eps)

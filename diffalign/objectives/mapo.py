"""MaPO: learn the winner and widen its margin over the loser, without a reference model."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LossOutput, check_errors, check_positive, correct, option
from .dpo import pair_loss

VARIANTS = ("code", "paper")
SERIES_BELOW = 0.1  # where the series of log phi is exact to fp64 and autograd through expm1 starts to cancel


def mapo_loss(
    policy_error: Tensor,
    *,
    variant: str = "code",
    beta: float | None = None,
    kappa: float | None = None,
    scale: float | None = None,
    exponent: float | None = None,
) -> LossOutput:
    """Margin-aware preference optimization (Hong et al. 2024, arXiv:2406.06424).

    Notation: policy_error -> l_w, l_l; phi(u) = u / (e^u - 1), which falls from 1 at u = 0 towards 0.

    ``code``, what the authors' program computes (utils.py, 374b3d3):

    1. score of each image    s = scale phi(kappa l)
    2. logit                  g = s_w - s_l
    3. loss                   l_w + beta (-log sigmoid(g))

    ``paper``, Eq. 9-11 of version 2, with the beta printed above the fraction read as an exponent (the reading under
    which scores stay in (0, 1) as the text says; not verified against the typeset equation):

    1. score of each image    s = phi(l)^exponent
    2. logit                  g = s_w - s_l
    3. loss                   l_w + (1 / exponent) (-log sigmoid(g))

    The two are different losses. Near l = 0 with the defaults, ``code`` pulls the winner with slope 13.5 (1 is plain
    fine-tuning, 12.5 the margin) and pushes the loser with -12.5; in ``paper`` the margin's
    slopes never exceed 0.37 for exponents of 1 and above. Where both errors are equal, the two slopes sum to 1.

    Without a reference the margin holds the images' own difficulty too: in ``code`` it saturates at a gap of about
    0.02, so a winner that is merely harder to denoise is pulled with full force and an easier one hardly at all.

    Args:
        policy_error: (B, 2) squared error, mean over C, H, W; winner first; fp32 or fp64.
        variant: ``code`` or ``paper``.
        beta: ``code`` only: weight of the margin term; None means 0.1. Not DPO's beta. 0 is fine-tuning on the winner.
        kappa: ``code`` only: sharpness of the score; None means 0.5 (``snr_value`` there).
        scale: ``code`` only: temperature of the margin; None means 1000, a constant of the loss, not of the scheduler.
        exponent: ``paper`` only: its beta; None means 128, the smallest of its ablation (128 to 1024).

    Returns:
        Per-pair loss (B,) and the stats ``rewards/chosen``, ``rewards/rejected`` (the scores s minus their maximum, so
        0 is a perfectly denoised image), ``rewards/margins`` (g), ``rewards/accuracies`` (a tie counts 1/2),
        ``gradient_factor`` (sigmoid(-g)), ``error/winner``, ``error/loser`` and ``loss/margin`` (-log sigmoid(g),
        without its weight).

    Raises:
        ValueError: a wrong shape, half precision, an unknown variant, or a parameter that the variant does not read.
    """
    check_errors(policy_error)
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}; got {variant!r}.")
    code = variant == "code"
    beta = option("beta", beta, 0.1, read=code, reader="variant 'code' (the paper's beta is called exponent)")
    kappa = option("kappa", kappa, 0.5, read=code, reader="variant 'code'")
    scale = option("scale", scale, 1000.0, read=code, reader="variant 'code'")
    exponent = option("exponent", exponent, 128.0, read=not code, reader="variant 'paper'")
    for name, value in (("kappa", kappa), ("scale", scale), ("exponent", exponent)):
        check_positive(name, value)
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be a finite number, 0 or above; got {beta!r}.")

    # s minus its maximum: expm1 keeps the digits that phi, close to 1 for small errors, would round away in fp32.
    if code:
        score, weight = scale * torch.expm1(log_phi(kappa * policy_error)), beta
    else:
        score, weight = torch.expm1(exponent * log_phi(policy_error)), 1 / exponent
    logit = score[:, 0] - score[:, 1]
    margin_loss = pair_loss(logit)
    margin = logit.detach()
    stats = {
        "rewards/chosen": score[:, 0].detach(),
        "rewards/rejected": score[:, 1].detach(),
        "rewards/margins": margin,
        "rewards/accuracies": correct(margin),
        "gradient_factor": torch.sigmoid(-margin),
        "error/winner": policy_error[:, 0].detach(),
        "error/loser": policy_error[:, 1].detach(),
        "loss/margin": margin_loss.detach(),
    }
    return LossOutput(policy_error[:, 0] + weight * margin_loss, stats)


def log_phi(u: Tensor) -> Tensor:
    """log(u / (e^u - 1)), with value and gradient accurate from u = 0 (0 and -1/2) to any size (-u + log u and -1).

    The direct form is 0/0 at u = 0 and inf/inf beyond u = 88. Both branches get harmless values where the other one
    is taken: a gradient through ``where`` would otherwise carry their NaN.
    """
    small = u.abs() < SERIES_BELOW
    low, high = u.where(small, torch.zeros_like(u)), u.where(~small, torch.ones_like(u))
    square = low * low
    series = -low / 2 - square * (1 / 24 - square * (1 / 2880 - square / 181440))
    return torch.where(small, series, -high - torch.log(-torch.expm1(-high) / high))

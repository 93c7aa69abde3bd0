"""GRPO for diffusion: raise the density of steps that led to pictures better than their group, with a clipped ratio."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import LossOutput

KL_FORMS = ("density", "prediction")


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    clip_range: float = 1e-4,
    normalise: tuple[Tensor, float, float] | None = None,
    kl: Tensor | None = None,
    kl_weight: float = 0.0,
) -> LossOutput:
    """Clipped policy gradient of one sampling step (Schulman et al. 2017, 1707.06347; Liu et al. 2025, 2505.05470).

    Notation: advantage -> A, log_prob -> log p, clip_range -> e.

    1. ratio       r = exp(log p - log p_old)
    2. surrogate   max(-A r, -A clip(r, 1 - e, 1 + e)): no gradient where A > 0 and r > 1 + e, or A < 0 and r < 1 - e
    3. loss        surrogate + kl_weight * kl

    ``normalise`` is RatioNorm (GRPO-Guard, 2510.22319). log p - log p_old is on average -drift, so that plain ratios
    are biased below 1 by an amount that differs between steps. With it, r = exp((log p - log p_old + drift) tau),
    whose exponent is the mean of z (mu - mu_old): unbiased, no division by tau. The surrogate is divided by ``width``
    to undo the step's own size. It is no importance ratio any more, only a trust region that is even over steps.

    Args:
        log_prob: (B,) fp32 or fp64 with gradient; by either convention of :func:`diffalign.diffusion.log_density`.
        old_log_prob: (B,) of the policy that sampled, the same convention.
        advantage: (B,).
        clip_range: e. Published values, 1e-5 to 1e-3, mean the ``mean`` convention; with ``sum`` it is about 0.2.
        normalise: (drift (B,) with gradient, tau, width) of the step, or None.
        kl: (B,) divergence from the reference with gradient, see :func:`step_kl`.
        kl_weight: its weight.

    Returns:
        Loss (B,), and stats ``ratio``, ``log_ratio``, ``clip_share`` (1 where the gradient is cut), ``surrogate`` and,
        where there is one, ``kl``.

    Raises:
        ValueError: shapes that differ, half precision, a NaN advantage, or a kl_weight without a kl.
    """
    _check(log_prob, old_log_prob, advantage, clip_range, kl, kl_weight)
    log_ratio, width = log_prob - old_log_prob.detach(), 1.0
    if normalise is not None:
        bias, std, width = normalise
        log_ratio = (log_ratio + bias) * std
    ratio = log_ratio.exp()
    weight = advantage.detach().to(ratio)
    free, held = -weight * ratio, -weight * ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.maximum(free, held) / width
    loss = surrogate if kl is None else surrogate + kl_weight * kl
    stats = {
        "ratio": ratio.detach(),
        "log_ratio": log_ratio.detach(),
        "clip_share": (held > free).to(ratio.dtype).detach(),
        "surrogate": surrogate.detach(),
    }
    return LossOutput(loss, stats if kl is None else stats | {"kl": kl.detach()})


def step_kl(prediction: Tensor, reference_prediction: Tensor, *, scale: float, std: float, form: str) -> Tensor:
    """How far a step is from the reference's, (B,) fp64, mean over elements, with gradient to ``prediction``.

    Args:
        prediction: (B, C, h, w) network output, guidance included.
        reference_prediction: the reference's at the same state.
        scale: k_p of the step: the means of both differ by k_p times the difference of predictions.
        std: tau of the step.
        form: ``density`` is the exact KL divergence of the two normal distributions, (k_p d)^2 / (2 tau^2); its weight
            differs by orders of magnitude between steps. ``prediction`` is d^2 itself, the same for all steps.

    Raises:
        ValueError: an unknown form.
    """
    if form not in KL_FORMS:
        raise ValueError(f"the form of the KL must be one of {', '.join(KL_FORMS)}; got {form!r}.")
    square = (prediction.float() - reference_prediction.float()).square().flatten(1)
    distance = square.sum(1, dtype=torch.float64) / square.shape[1]
    return distance * scale**2 / (2 * std**2) if form == "density" else distance


def _check(
    log_prob: Tensor, old: Tensor, advantage: Tensor, clip_range: float, kl: Tensor | None, kl_weight: float
) -> None:
    for name, value in (("old_log_prob", old), ("advantage", advantage), ("kl", kl)):
        if value is not None and (value.shape != log_prob.shape or value.ndim != 1):
            raise ValueError(f"{name} must be (B,) like log_prob, {tuple(log_prob.shape)}; got {tuple(value.shape)}.")
    for name, value in (("log_prob", log_prob), ("old_log_prob", old)):
        if value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} must be float32 or float64, got {value.dtype}: a clip range of 1e-4 needs digits."
            )
    if bool(torch.isnan(advantage).any()):
        raise ValueError("an advantage is NaN; pictures without a reward have advantage 0 (see group_advantages).")
    if not (math.isfinite(clip_range) and clip_range > 0):
        raise ValueError(f"clip_range must be a finite number above 0; got {clip_range!r}.")
    if kl is None and kl_weight:
        raise ValueError(f"kl_weight={kl_weight} has no effect without kl: pass step_kl(...), or leave it out.")

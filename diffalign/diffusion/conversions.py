"""What a network's output says about the noise and about the clean picture.

With x = a x0 + b eps (for flow models a = 1 - sigma, b = sigma and u = eps - x0):

    epsilon        eps = output             x0 = (x - b eps) / a
    v_prediction   eps = a v + b x          x0 = a x - b v
    sample         eps = (x - a x0) / b     x0 = output
    flow           eps = x + a u            x0 = x - b u

All tensors share one floating type and broadcast; nothing is cast here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def implied_noise(prediction_type: str, prediction: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The noise that ``prediction`` implies where x = a x0 + b eps; b must not be 0 for ``sample``."""
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "sample":
        return (x - a * prediction) / b
    if prediction_type == "flow":
        return x + a * prediction
    return a * prediction + b * x


def implied_clean(prediction_type: str, prediction: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The clean latent that ``prediction`` implies; 0, the mean of latents, for an epsilon model where a is 0."""
    if prediction_type == "sample":
        return prediction
    if prediction_type == "flow":
        return x - b * prediction
    if prediction_type == "v_prediction":
        return a * x - b * prediction
    return torch.where(a > 0, (x - b * prediction) / a.clamp_min(torch.finfo(a.dtype).tiny), 0.0)

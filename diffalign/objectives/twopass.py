"""The derivative of an objective by each error: all that a backward pass in chunks needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .base import LossOutput


def error_gradients(objective: Callable[[Tensor], LossOutput], policy_error: Tensor) -> tuple[LossOutput, Tensor]:
    """Evaluate an objective on errors that carry no graph, with its derivative by each of them.

    An objective sees the model only through the errors l_i. So the model's gradient is

        d loss / d theta = sum_i w_i d l_i / d theta,   w_i = d loss / d l_i

    and long lists train in the memory of a short one: compute all errors without a graph, call this, then run the
    images again in chunks and back-propagate ``(weights * error).sum()``. Exact, for one more forward pass, if both
    passes see the same noisy latents and the same dropout.

    Args:
        objective: of the policy error alone; the rest is bound, e.g. ``lambda e: dpo_loss(e, reference_error)``. Its
            loss of a row may depend on the errors of that row only, as that of every objective here does.
        policy_error: (B, k); a graph it may carry is not followed.

    Returns:
        The objective's output, detached, and the weights (B, k): row b holds d loss_b / d error_b.

    Raises:
        ValueError: the loss does not depend on the errors through autograd.
    """
    # Also in a caller's no_grad or inference_mode: the first pass has no other reason to leave it.
    with torch.inference_mode(False), torch.enable_grad():
        leaf = policy_error.detach().clone().requires_grad_()
        out = objective(leaf)
        if not out.loss.requires_grad:
            raise ValueError("the objective's loss must be differentiable in the errors it is given; it has no graph.")
        (weights,) = torch.autograd.grad(out.loss.sum(), leaf)
    return LossOutput(out.loss.detach(), out.stats), weights

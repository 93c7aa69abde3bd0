"""Weights of the negative branch: base + alpha (positive - base) + beta (negative - base), by name, in fp32.

The alpha term keeps the negative model close to a positively aligned one (Diffusion-NPO, 2505.11245): the further the
two branches are apart, the more of their difference is noise that guidance blows up.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

Weights = Mapping[str, Tensor]


def mix_weights(
    base: Weights,
    *,
    positive: Weights | None = None,
    negative: Weights | None = None,
    alpha: float = 0.0,
    beta: float = 1.0,
) -> dict[str, Tensor]:
    """base + alpha (positive - base) + beta (negative - base), each weight found by its name.

    Args:
        base: weights by name.
        positive: of the aligned model; None counts as the base.
        negative: of the negatively trained model; None counts as the base.
        alpha, beta: any numbers; the paper keeps both in [0, 1].

    Returns:
        Weights in the order and dtypes of ``base``, added up in fp32. What is no floating-point number (a counter, say)
        is the base's.

    Raises:
        CheckpointError: names or shapes differ.
    """
    for what, other in (("positive", positive), ("negative", negative)):
        if other is not None:
            require_same(base, other, what)
    mixed = {}
    for name, weight in base.items():
        if not weight.is_floating_point():
            mixed[name] = weight.clone()
            continue
        start = weight.float()
        total = start.clone()
        for scale, other in ((alpha, positive), (beta, negative)):
            if other is not None and scale:
                total += scale * (other[name].to(start.device, torch.float32) - start)
        mixed[name] = total.to(weight.dtype)
    return mixed


def base_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """A network's own weights by name, as if it carried no adapters."""
    inside = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")
    return {
        name.replace(".base_layer.", "."): weight.detach()
        for name, weight in denoiser.state_dict().items()
        if not any(part in name for part in inside)
    }


def merged_weights(denoiser: nn.Module, adapters: list[str]) -> dict[str, Tensor]:
    """A network's weights by name with these of its adapters merged in, at their present scales, in fp32."""
    network: Any = copy.deepcopy(denoiser).float()
    network.fuse_lora(adapter_names=adapters)
    network.unload_lora()
    return base_weights(network)


def network_of(denoiser: nn.Module, weights: Weights) -> nn.Module:
    """Another network like ``denoiser``, without adapters, with these weights; frozen, on its device, in its dtype."""
    like: Any = denoiser
    network = type(like).from_config(like.config)
    network.load_state_dict(dict(weights))
    return network.to(like.device, like.dtype).eval().requires_grad_(False)


def require_same(base: Weights, other: Weights, what: str) -> None:
    """Refuse weights of another architecture.

    Raises:
        CheckpointError: names or shapes differ.
    """
    differing = sorted(base.keys() ^ other.keys()) or [n for n in base if base[n].shape != other[n].shape]
    if differing:
        raise CheckpointError(
            f"the {what} model is of another architecture than the base: {len(differing)} weights differ in name or "
            f"shape, {differing[0]} first. Use models fine-tuned from the same base."
        )

"""The regression head that LAION's aesthetic predictor v2 and ImageReward share.

It is five linear layers with dropout and nothing else between them, so when it predicts it is one affine map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import RewardModelError
from .weights import State

LAYERS = (0, 2, 4, 6, 7)  # places of the linear layers in the original nn.Sequential; the rest is dropout


def fold(state: State, label: str, *, layers: tuple[int, ...] = LAYERS, prefix: str = "layers.") -> nn.Linear:
    """The layers ``{prefix}{number}.weight`` and ``.bias`` as one fp32 ``nn.Linear(width, 1)``, composed in fp64.

    Raises:
        RewardModelError: other keys than these (a head with activations numbers its layers differently, and is not
            affine), or shapes that do not follow one another.
    """
    wanted = {f"{prefix}{n}.{kind}" for n in layers for kind in ("weight", "bias")}
    return _compose(state, wanted, [f"{prefix}{n}" for n in layers], label)


def single(state: State, label: str) -> nn.Linear:
    """A head that is one linear layer, with the keys ``weight`` and ``bias``."""
    return _compose(state, {"weight", "bias"}, [""], label)


def _compose(state: State, wanted: set[str], names: list[str], label: str) -> nn.Linear:
    if set(state) != wanted:
        difference = sorted(set(state) ^ wanted)
        raise RewardModelError(f"{label}: the head's keys are not {sorted(wanted)[:2]}...: {difference[:6]} differ.")
    weight: Tensor | None = None
    bias = torch.zeros(1, dtype=torch.float64)
    for name in names:
        point = f"{name}." if name else ""
        w, b = state[f"{point}weight"].double(), state[f"{point}bias"].double()
        if w.ndim != 2 or b.shape != w.shape[:1] or (weight is not None and w.shape[1] != weight.shape[0]):
            raise RewardModelError(f"{label}: the head's layer {name or 'weight'} has the shape {tuple(w.shape)}.")
        weight, bias = (w, b) if weight is None else (w @ weight, w @ bias + b)
    assert weight is not None
    if weight.shape[0] != 1:
        raise RewardModelError(f"{label}: the head gives {weight.shape[0]} numbers, expected 1.")
    head = nn.Linear(weight.shape[1], 1)
    head.weight.data, head.bias.data = weight.float(), bias.float()
    return head.requires_grad_(False)

"""Names of modules in the original code of a family, which kohya's files and ComfyUI use.

Those of the transformers are in ``transformer_names.py``. For UNets the original is the LDM / SGM code, where
diffusers' groups by resolution are numbered in one list per half:

    diffusers                                       original
    conv_in                                         input_blocks.0.0
    down_blocks.i.resnets.j                         input_blocks.{1 + i (n + 1) + j}.0
    down_blocks.i.attentions.j                      input_blocks.{1 + i (n + 1) + j}.1
    down_blocks.i.downsamplers.0.conv               input_blocks.{(i + 1) (n + 1)}.0.op
    mid_block.resnets.0, attentions.0, resnets.1    middle_block.0, middle_block.1, middle_block.2
    up_blocks.i.resnets.j                           output_blocks.{i (n + 1) + j}.0
    up_blocks.i.attentions.j                        output_blocks.{i (n + 1) + j}.1
    up_blocks.i.upsamplers.0.conv                   output_blocks.{i (n + 1) + n}.{2 with attention, else 1}.conv
    time_embedding.linear_1 / _2                    time_embed.0 / .2
    add_embedding.linear_1 / _2                     label_emb.0.0 / .0.2
    conv_out                                        out.2

with n layers per block, and inside a residual block conv1 -> in_layers.2, conv2 -> out_layers.3, time_emb_proj ->
emb_layers.1, conv_shortcut -> skip_connection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Original:
    """The module of the original network that holds a diffusers module's weights.

    Args:
        name: in the original network.
        parts: the diffusers modules whose outputs are, one below the other, those of the original; one alone where
            the two networks have the same module.
        swapped: diffusers keeps the two halves of the outputs the other way round.
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESIDUAL = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def original_name(name: str, layers_per_block: int, up_blocks_with_attention: set[int]) -> str:
    """The original code's name of a diffusers UNet module.

    Args:
        name: module name in ``UNet2DConditionModel``.
        layers_per_block: n above.
        up_blocks_with_attention: indices of the up blocks that attend.

    Raises:
        KeyError: the original has no such module.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if match := _MIDDLE.fullmatch(name):
        kind, j, rest = match.groups()
        place = {"resnets": 2 * int(j), "attentions": 1}[kind]
        return f"middle_block.{place}.{_inside(kind, rest)}"
    if match := _BLOCK.fullmatch(name):
        half, i, kind, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        stride = layers_per_block + 1
        if half == "down":
            if kind == "downsamplers":
                return f"input_blocks.{(i + 1) * stride}.0.op"
            return f"input_blocks.{1 + i * stride + j}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
        if kind == "upsamplers":
            return f"output_blocks.{i * stride + layers_per_block}.{2 if i in up_blocks_with_attention else 1}.conv"
        return f"output_blocks.{i * stride + j}.{int(kind == 'attentions')}.{_inside(kind, rest)}"
    raise KeyError(name)


def _inside(kind: str, rest: str) -> str:
    return _RESIDUAL[rest] if kind == "resnets" else rest

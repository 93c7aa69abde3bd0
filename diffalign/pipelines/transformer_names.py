"""Names of SD3's and FLUX's modules in the original code, which kohya's files and ComfyUI use.

The original keeps q, k and v (and, in FLUX's single blocks, the first layer of the feed-forward) in one matrix, and its
output norm says shift before scale where diffusers says scale before shift.
"""

from __future__ import annotations

import re

from .names import Original

_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")

_SD3_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
_SD3_BLOCK = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}

_FLUX_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
_FLUX_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}


def sd3_original(name: str, num_layers: int) -> Original:
    """The original code's module of an ``SD3Transformer2DModel`` module.

    Args:
        name: module name in diffusers.
        num_layers: blocks of the network; the last one's text half only feeds the attention, and its norm is a final
            one.

    Raises:
        KeyError: the original has no such module.
    """
    if name == "norm_out.linear":
        return Original("final_layer.adaLN_modulation.1", (name,), swapped=True)
    if name in _SD3_OUTSIDE:
        return Original(_SD3_OUTSIDE[name], (name,))
    block, number, inside = _split(name)
    found = _within(_SD3_BLOCK, inside, f"{block}.{number}", f"joint_blocks.{number}", name)
    final = inside == "norm1_context.linear" and int(number) == num_layers - 1
    return Original(found.name, found.parts, swapped=final)


def flux_original(name: str) -> Original:
    """The original code's module of a ``FluxTransformer2DModel`` module.

    Raises:
        KeyError: the original has no such module.
    """
    if name == "norm_out.linear":
        return Original("final_layer.adaLN_modulation.1", (name,), swapped=True)
    if name in _FLUX_OUTSIDE:
        return Original(_FLUX_OUTSIDE[name], (name,))
    block, number, inside = _split(name)
    single = block.startswith("single")
    table, theirs = (_FLUX_SINGLE, "single_blocks") if single else (_FLUX_DOUBLE, "double_blocks")
    return _within(table, inside, f"{block}.{number}", f"{theirs}.{number}", name)


def _split(name: str) -> tuple[str, str, str]:
    match = _BLOCK.fullmatch(name)
    if match is None:
        raise KeyError(name)
    return match[1], match[2], match[3]


def _within(table: dict[str, tuple[str, ...]], inside: str, ours: str, theirs: str, name: str) -> Original:
    for original, parts in table.items():
        if inside in parts:
            return Original(f"{theirs}.{original}", tuple(f"{ours}.{part}" for part in parts))
    raise KeyError(name)

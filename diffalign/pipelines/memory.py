"""Will it fit? Memory of a training recipe, counted from the denoiser's configuration on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from ..errors import ConfigError
from .base import PipelineAdapter
from .flow import PATCH
from .flux import FluxAdapter
from .sd3 import StableDiffusion3Adapter
from .sdxl import StableDiffusionXLAdapter

GIB = 2**30
_BYTES = {"no": 4, "fp16": 2, "bf16": 2}
# Bytes of optimizer state per trained fp32 parameter. Adafactor keeps one row and one column per matrix: about nothing.
_STATE = {"adamw": 8.0, "adamw_8bit": 2.0, "adafactor": 0.05}
# Elements that autograd keeps per element that a residual or transformer layer writes: the inputs of normalisations,
# activations, projections, sums and the gated feed-forward. Rough; the test compares them with the tensors autograd
# saves for the full-size UNets (SDXL at 1024: 14.7 GiB here, 12.8 without and 14.5 with LoRA there).
_KEPT_PER_RESNET = 8
_KEPT_PER_TRANSFORMER_LAYER = 34
# The same for each token of a block, in widths of the network: joint blocks, then single ones. Training all weights
# saves this much in the same trace; LoRA saves 12 in SD3, 19 and 12 in FLUX, so there the estimate is on the safe side.
_KEPT_PER_SD3_BLOCK = (21, 0)
_KEPT_PER_FLUX_BLOCK = (25, 21)
_CLIP_TOKENS = 77
#: Network, the configuration key that tells it where there is no ``_class_name``, and its family's adapter.
_NETWORKS: tuple[tuple[type[nn.Module], str, type[PipelineAdapter]], ...] = (
    (UNet2DConditionModel, "down_block_types", StableDiffusionXLAdapter),
    (SD3Transformer2DModel, "caption_projection_dim", StableDiffusion3Adapter),
    (FluxTransformer2DModel, "guidance_embeds", FluxAdapter),
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device.

    All but the last are counted from the configuration. ``activations`` is rough, and the CUDA context, fragmentation
    and workspaces (1 to 3 GiB) come on top.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    reference: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in asdict(self).items() if value)
        return f"about {self.total / GIB:.1f} GiB ({parts}; activations are rough)"


def estimate_memory(
    config: Mapping[str, Any],
    *,
    adapter: str = "lora",
    lora_rank: int = 16,
    lora_targets: Sequence[str] | None = None,
    mixed_precision: str = "bf16",
    optimizer: str = "adamw",
    resolution: int = 1024,
    images: int = 2,
    gradient_checkpointing: bool = False,
    reference: bool = True,
    reference_dtype: str = "same",
    ema: bool = False,
    vae_scale_factor: int = 8,
) -> MemoryEstimate:
    """Memory of one training step, without building the weights.

    The encoders are not counted: the trainer moves them off the device once everything is cached.

    Args:
        config: configuration of a ``UNet2DConditionModel``, ``SD3Transformer2DModel`` or ``FluxTransformer2DModel``.
        adapter, lora_rank, mixed_precision, optimizer, gradient_checkpointing, reference_dtype: as in
            :class:`TrainingConfig`.
        lora_targets: None takes the family's own.
        resolution: edge of a square image in pixels.
        images: images per forward pass: 2 per pair.
        reference: whether the method has one; with an adapter it costs nothing.
        ema: whether a moving average of the trained weights is kept.
        vae_scale_factor: pixels per latent cell.

    Raises:
        ConfigError: an unknown value or network, or targets that match nothing.
    """
    for name, value, allowed in (
        ("mixed_precision", mixed_precision, _BYTES),
        ("optimizer", optimizer, _STATE),
        ("adapter", adapter, ("lora", "dora", "none")),
        ("reference_dtype", reference_dtype, ("same", "bf16", "fp16")),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
    denoiser = meta_denoiser(config)
    base = parameter_count(denoiser)
    act = _BYTES[mixed_precision]
    if adapter == "none":
        trained, weights, added = base, 4 * base, 0
        weights += act * base if act < 4 else 0  # autocast keeps half-precision copies of the weights within a step
        copy = 4 if reference_dtype == "same" else 2
    else:
        targets = _family(config).default_lora_targets if lora_targets is None else lora_targets
        trained = lora_parameter_count(denoiser, lora_rank, targets, dora=adapter == "dora")
        weights, added, copy = act * base, 4 * trained, 0
    return MemoryEstimate(
        weights=weights,
        adapter=added,
        gradients=4 * trained,
        optimizer=int(_STATE[optimizer] * trained) + (4 * trained if ema else 0),
        reference=copy * base if reference else 0,
        activations=_activations(config, resolution // vae_scale_factor, gradient_checkpointing) * images * act,
    )


def meta_denoiser(config: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, without storage.

    Raises:
        ConfigError: no network of a supported family.
    """
    network: Any = next(network for network, _, family in _NETWORKS if family is _family(config))
    with torch.device("meta"):
        return network.from_config(dict(config))


def _family(config: Mapping[str, Any]) -> type[PipelineAdapter]:
    said = config.get("_class_name")
    for network, key, family in _NETWORKS:
        if said == network.__name__ or (said is None and key in config):
            return family
    raise ConfigError(
        f"memory can be estimated for {', '.join(network.__name__ for network, _, _ in _NETWORKS)}; got the "
        f"configuration of {said or 'an unknown network'}."
    )


def parameter_count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def lora_modules(module: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and convolution layers whose name is, or ends with, one of ``targets`` (peft's rule for lists)."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and any(name == t or name.endswith(f".{t}") for t in targets)
    }


def lora_parameter_count(module: nn.Module, rank: int, targets: Sequence[str], *, dora: bool = False) -> int:
    """Parameters that peft adds: rank x (in x kernel + out) per layer, and one magnitude per output for DoRA.

    Raises:
        ConfigError: no layer matches.
    """
    layers = lora_modules(module, targets)
    if not layers:
        raise ConfigError(f"lora_targets {list(targets)} match no layer.")
    count = 0
    for layer in layers.values():
        out, *rest = layer.weight.shape
        count += rank * (int(torch.Size(rest).numel()) + out) + (out if dora else 0)
    return count


def _activations(config: Mapping[str, Any], side: int, checkpointing: bool) -> int:
    """Rough number of elements that one image leaves for the backward pass.

    With checkpointing only the outputs of blocks stay, and one block is recomputed at a time.
    """
    family = _family(config)
    if family is StableDiffusion3Adapter:
        text = _CLIP_TOKENS + family.default_sequence_length
        return _transformer_activations(config, side, text, _KEPT_PER_SD3_BLOCK, checkpointing)
    if family is FluxAdapter:
        text = family.default_sequence_length
        return _transformer_activations(config, side, text, _KEPT_PER_FLUX_BLOCK, checkpointing)
    return _unet_activations(config, side, checkpointing)


def _transformer_activations(
    config: Mapping[str, Any], side: int, text: int, kept: tuple[int, int], checkpointing: bool
) -> int:
    """All tokens, of image and text, have the same width through all blocks."""
    joint, single = config["num_layers"], config.get("num_single_layers", 0)
    size = ((side // PATCH) ** 2 + text) * config["num_attention_heads"] * config["attention_head_dim"]
    if checkpointing:
        return size * (joint + single + kept[0])
    return size * (joint * kept[0] + single * kept[1])


def _unet_activations(config: Mapping[str, Any], side: int, checkpointing: bool) -> int:
    """Levels of falling resolution, each with residual and transformer layers."""
    channels = list(config["block_out_channels"])
    depth = len(channels)
    layers = config.get("layers_per_block", 2)
    transformers = config.get("transformer_layers_per_block", 1)
    transformers = [transformers] * depth if isinstance(transformers, int) else list(transformers)
    kept = stored = largest = 0
    halves = (("down_block_types", 0, layers), ("up_block_types", 1, layers + 1))
    for key, up, count in halves:
        for i, kind in enumerate(config[key]):
            level = depth - 1 - i if up else i
            size = channels[level] * (side // 2**level) ** 2
            attention = transformers[level] * _KEPT_PER_TRANSFORMER_LAYER if "Attn" in kind else 0
            stored += count * size
            kept += count * size * (_KEPT_PER_RESNET + attention)
            largest = max(largest, size * (_KEPT_PER_RESNET + attention))
    size = channels[-1] * (side // 2 ** (depth - 1)) ** 2
    middle = size * (2 * _KEPT_PER_RESNET + transformers[-1] * _KEPT_PER_TRANSFORMER_LAYER)
    return 2 * stored + max(largest, middle) if checkpointing else kept + middle

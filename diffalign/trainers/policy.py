"""Makes a pipeline's denoiser trainable: precision, adapters, attention, gradient checkpointing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from torch import nn

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..pipelines import PipelineAdapter
    from ..pipelines.base import Denoiser
    from .config import TrainingConfig

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def prepare_policy(adapter: PipelineAdapter, config: TrainingConfig, device: torch.device) -> list[nn.Parameter]:
    """Set up ``adapter.denoiser`` in place and return its trainable parameters, fp32.

    With an adapter the frozen base rests in ``mixed_precision`` and only the adapter is fp32. Without one all weights
    are fp32 masters and autocast does the rest.

    Raises:
        ConfigError: no module has a name in ``lora_targets``, the pipeline already carries adapters, or
            ``channels_last`` with a transformer.
    """
    denoiser = adapter.denoiser
    if getattr(denoiser, "peft_config", None):
        raise ConfigError(
            f"the pipeline already carries adapters ({', '.join(denoiser.peft_config)}); fuse them with "
            "pipeline.fuse_lora() and unload_lora_weights(), or load the pipeline anew."
        )
    if config.channels_last and adapter.denoiser_name != "unet":
        raise ConfigError(
            f"channels_last=true is for networks of convolutions, a {type(denoiser).__name__} is none: leave it out."
        )
    denoiser.requires_grad_(False)
    adapter.set_attention(config.attention)
    if config.adapter == "none":
        denoiser.to(device, torch.float32).requires_grad_(True)
    else:
        denoiser.to(device, DTYPES[config.mixed_precision])
        _add_adapter(denoiser, config, config.lora_targets or list(adapter.default_lora_targets))
    if config.channels_last:
        denoiser.to(memory_format=torch.channels_last)
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.to(torch.float32)
    return trainable


def _add_adapter(denoiser: Denoiser, config: TrainingConfig, targets: list[str]) -> None:
    names = [name for name, _ in denoiser.named_modules()]
    unmatched = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if unmatched:
        raise ConfigError(
            f"lora_targets {unmatched} match no module of {type(denoiser).__name__}. Leave lora_targets out to take "
            "the family's own, or name modules of print(pipeline)."
        )
    torch_state = torch.get_rng_state()
    torch.manual_seed(config.seed)  # the adapter's random half must not depend on what ran before
    denoiser.add_adapter(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha if config.lora_alpha is not None else config.lora_rank,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            init_lora_weights="gaussian" if config.adapter == "lora" else True,
            use_dora=config.adapter == "dora",
        )
    )
    torch.set_rng_state(torch_state)

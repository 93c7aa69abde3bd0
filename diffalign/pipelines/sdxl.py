"""Stable Diffusion XL: two text encoders, a pooled embedding, and six numbers about the image's size and crop."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .base import PipelineAdapter
from .names import Original, original_name


class StableDiffusionXLAdapter(PipelineAdapter):
    """SDXL base, SDXL-Turbo and their fine-tunes (the refiner, which has other conditions, is not one of them).

    The time ids stay fp32 until the sinusoidal embedding. The inference pipeline casts them to the model's dtype
    before it, which in bf16 turns a width of 1023 into 1024; all sizes that SDXL samples by default survive that cast
    unchanged, so training and inference agree where it matters and training is exact elsewhere.
    """

    family: ClassVar[str] = "sdxl"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    kohya_network: ClassVar[str | None] = "networks.lora"

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self._require_text_encoders()
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.text_encoders[-1].device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        """Zeros where the pipeline says ``force_zeros_for_empty_prompt`` (SDXL base does), else the encoded ""."""
        self._require_text_encoders()
        _, negative, _, pooled = self.pipeline.encode_prompt(
            [""], device=self.text_encoders[-1].device, do_classifier_free_guidance=True
        )
        return {"prompt_embeds": negative.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}

    def size_conditioning(self, size_ids: Tensor) -> dict[str, Tensor]:
        """SDXL's time ids (Podell et al. 2023, 2307.01952, section 2.2), in the order of ``size_ids``.

        Raises:
            ConfigError: not (N, 6) fp32: in half precision the sizes are rounded already.
        """
        if size_ids.ndim != 2 or size_ids.shape[1] != 6 or size_ids.dtype != torch.float32:
            raise ConfigError(
                f"size_ids must be (N, 6) float32; got {tuple(size_ids.shape)} {size_ids.dtype}. Half precision cannot "
                "hold image sizes."
            )
        return {"time_ids": size_ids}

    def call_denoiser(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        time: Tensor,
        conditioning: dict[str, Tensor],
        sizes: dict[str, Tensor],
    ) -> Tensor:
        return denoiser(
            noisy,
            time,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs={"text_embeds": conditioning["pooled_prompt_embeds"], **sizes},
            return_dict=False,
        )[0]

    def original_module(self, name: str) -> Original:
        """The original code's block; kohya's SDXL files are named after it, its SD files after diffusers'."""
        config = self.denoiser.config
        attending = {i for i, kind in enumerate(config.up_block_types) if "Attn" in kind}
        return Original(original_name(name, config.layers_per_block, attending), (name,))

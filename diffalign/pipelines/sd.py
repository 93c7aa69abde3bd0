"""Stable Diffusion 1.x and 2.x: one text encoder, no size conditioning; epsilon or v prediction."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .base import PipelineAdapter


class StableDiffusionAdapter(PipelineAdapter):
    """SD1.5, SD2.1 and their fine-tunes. Whether they predict epsilon or v is in the scheduler's configuration."""

    family: ClassVar[str] = "sd"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer",)
    kohya_network: ClassVar[str | None] = "networks.lora"

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self._require_text_encoders()
        embeds, _ = self.pipeline.encode_prompt(
            prompts, self.text_encoders[0].device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds.float().cpu()}

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        self._require_text_encoders()
        _, negative = self.pipeline.encode_prompt(
            [""], self.text_encoders[0].device, num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return {"prompt_embeds": negative.float().cpu()}

    def call_denoiser(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        time: Tensor,
        conditioning: dict[str, Tensor],
        sizes: dict[str, Tensor],
    ) -> Tensor:
        return denoiser(noisy, time, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False)[0]

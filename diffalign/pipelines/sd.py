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

    def size_conditioning(self, size_ids: Tensor) -> dict[str, Tensor]:
        return {}

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        size_ids: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        context = conditioning["prompt_embeds"].to(dtype)
        return denoiser(noisy.to(context.dtype), t, encoder_hidden_states=context, return_dict=False)[0]

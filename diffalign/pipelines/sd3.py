"""Stable Diffusion 3 and 3.5: two CLIPs and a T5, a pooled embedding, flow matching."""

from __future__ import annotations

from typing import ClassVar

import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

from ..errors import ConfigError
from .flow import FlowTransformerAdapter
from .names import Original
from .transformer_names import sd3_original


class StableDiffusion3Adapter(FlowTransformerAdapter):
    """SD3 and SD3.5, medium and large.

    T5 may be absent (``text_encoder_3=None`` when the pipeline is loaded): prompts then carry zeros in its place, as in
    the pipeline, and all that comes out can be sampled with and without it.
    """

    family: ClassVar[str] = "sd3"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    # the projections of both streams, as in diffusers' train_dreambooth_lora_sd3.py
    default_lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    kohya_network: ClassVar[str | None] = "networks.lora_sd3"
    t5_tokenizer: ClassVar[str] = "tokenizer_3"
    default_sequence_length: ClassVar[int] = 256
    default_max_shift: ClassVar[float] = 1.16

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self._encode(prompts, guided=False)
        return {"prompt_embeds": embeds.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}

    @torch.no_grad()
    def unconditional(self) -> dict[str, Tensor]:
        _, embeds, _, pooled = self._encode([""], guided=True)
        return {"prompt_embeds": embeds.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}

    def call_denoiser(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        time: Tensor,
        conditioning: dict[str, Tensor],
        sizes: dict[str, Tensor],
    ) -> Tensor:
        return denoiser(
            hidden_states=noisy,
            timestep=time,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def original_module(self, name: str) -> Original:
        return sd3_original(name, self.denoiser.config.num_layers)

    def _encode(self, prompts: list[str], *, guided: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._require_text_encoders()
        return self.pipeline.encode_prompt(
            prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.text_encoders[0].device,
            do_classifier_free_guidance=guided,
            max_sequence_length=self.max_sequence_length,
        )

    def _set_attention(self, kind: str) -> None:
        if kind == "eager":
            raise ConfigError("attention=eager does not exist for SD3 (diffusers has no such processor); use sdpa.")
        self.denoiser.set_attn_processor(JointAttnProcessor2_0())
        if kind == "xformers":
            self.denoiser.enable_xformers_memory_efficient_attention()

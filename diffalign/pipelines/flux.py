"""FLUX.1 (dev and schnell): a pooled CLIP and a T5, packed latents, rotary positions, flow matching."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

from .flow import PATCH, FlowTransformerAdapter
from .names import Original
from .transformer_names import flux_original

_BACKENDS = {
    "sdpa": AttentionBackendName.NATIVE,
    "eager": AttentionBackendName._NATIVE_MATH,
    "xformers": AttentionBackendName.XFORMERS,
}


class FluxAdapter(FlowTransformerAdapter):
    """FLUX.1-dev, FLUX.1-schnell and their fine-tunes.

    ``guidance_embedding`` is what a network with a guidance embedding (dev) is told in training, policy and reference
    alike. The default is 1.0: there the distilled network stands for the plain conditional velocity, whose target the
    error measures; at 3.5 its output is an extrapolation that no (latent, noise) pair has as its velocity, and training
    on that error unlearns the guidance. most trainers use 1.0 for that reason; diffusers'
    DreamBooth script defaults to 3.5, and the commands in its README pass 1. Sampling keeps its usual 3.5.

    Latents are (N, C, h, w) everywhere outside the network; 2 x 2 cells become a token in :meth:`call_denoiser`.

    The time enters the network as fp32 sigma. In bf16 the network rounds it once; the sampling pipeline rounds
    ``1000 sigma`` before that as well.
    """

    family: ClassVar[str] = "flux"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    text_encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    tokenizer_names: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    # both streams of the double blocks, attention and feed-forward, as in diffusers' train_dreambooth_lora_flux.py
    default_lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    kohya_network: ClassVar[str | None] = "networks.lora_flux"
    t5_tokenizer: ClassVar[str] = "tokenizer_2"
    default_sequence_length: ClassVar[int] = 512
    default_max_shift: ClassVar[float] = 1.15
    spaces_levels: ClassVar[bool] = True
    guidance_embedding: float = 1.0

    def configure(self, *, max_prompt_tokens: int | None = None, guidance_embedding: float | None = None) -> None:
        if guidance_embedding is not None and self.embeds_guidance:
            self.guidance_embedding, guidance_embedding = guidance_embedding, None
        super().configure(max_prompt_tokens=max_prompt_tokens, guidance_embedding=guidance_embedding)

    @property
    def native_size(self) -> tuple[int, int]:
        edge = int(self.pipeline.default_sample_size) * self.vae_scale_factor
        return edge, edge

    @property
    def embeds_guidance(self) -> bool:
        """Whether the network is told a guidance scale (dev) or not (schnell)."""
        return bool(self.denoiser.config.guidance_embeds)

    def denoiser_channels(self, side: str) -> int:
        config: Any = self.denoiser.config
        return int(config[f"{side}_channels"] or config["in_channels"]) // PATCH**2

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        self._require_text_encoders()
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.text_encoders[0].device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeds.float().cpu(), "pooled_prompt_embeds": pooled.float().cpu()}

    def unconditional(self) -> dict[str, Tensor]:
        """The encoded ""; the pipeline has a negative branch only when it is given a negative prompt."""
        return self.encode_prompts([""])

    def call_denoiser(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        time: Tensor,
        conditioning: dict[str, Tensor],
        sizes: dict[str, Tensor],
    ) -> Tensor:
        height, width = noisy.shape[2:]
        context = conditioning["prompt_embeds"]
        told = noisy.new_full((len(noisy),), self.guidance_embedding, dtype=torch.float32)
        predicted = denoiser(
            hidden_states=pack(noisy),
            timestep=time / 1000,
            guidance=told if self.embeds_guidance else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=context,
            txt_ids=torch.zeros(context.shape[1], 3, device=noisy.device),
            img_ids=_positions(height // PATCH, width // PATCH, noisy.device),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width)

    def original_module(self, name: str) -> Original:
        return flux_original(name)

    def sampling_arguments(
        self,
        conditioning: dict[str, Tensor],
        unconditional: dict[str, Tensor],
        noise: Tensor,
        guidance: float,
    ) -> dict[str, Any]:
        """With a guidance embedding ``guidance`` is what the network is told; without, the scale of true guidance.

        Inside :func:`diffalign.guidance.negative_guidance` it is the scale of true guidance, which alone has a negative
        branch, and the network is told the same as in training.
        """
        arguments: dict[str, Any] = {**conditioning, "latents": pack(noise)}
        if self.embeds_guidance:
            if not hasattr(self.denoiser, "answered_by"):
                return arguments | {"guidance_scale": guidance}
            arguments["guidance_scale"] = self.guidance_embedding
        negative = self._negative(unconditional, len(noise)) if guidance > 1 else {}
        return arguments | negative | {"true_cfg_scale": guidance}

    def sampled_latents(self, output: Tensor, latent_shape: tuple[int, int]) -> Tensor:
        return unpack(output, *latent_shape)

    def _set_attention(self, kind: str) -> None:
        # Set on the processor: ModelMixin.set_attention_backend would also change it for every other network.
        processor = FluxAttnProcessor()
        processor._attention_backend = _BACKENDS[kind]
        self.denoiser.set_attn_processor(processor)


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h/2 * w/2, 4 C): one token for 2 x 2 cells, channel first."""
    count, channels, height, width = latents.shape
    cells = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`; ``height`` and ``width`` are those of the latents."""
    count = len(tokens)
    cells = tokens.reshape(count, height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, height, width)


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 3) fp32: 0, row and column of each token."""
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)[None, :]
    return grid.reshape(-1, 3)

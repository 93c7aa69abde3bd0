"""What the flow-matching transformers share: shifted timesteps, 2 x 2 patches, a T5 that reads the prompt."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from ..diffusion import SamplingGrid, Schedule, flow_grid
from .base import PipelineAdapter

PATCH = 2  # latent cells along one side of a token: SD3 cuts them inside the network, FLUX packs them before it


class FlowTransformerAdapter(PipelineAdapter):
    """Base of SD3 and FLUX.

    ``max_sequence_length`` is the number of tokens T5 reads, and the pipeline's own default unless it is set. All of
    them are stored for every prompt (SD3: 333 x 4096 numbers, FLUX: 512 x 4096), so shorter prompts can save most of a
    cache. Set it before anything is encoded; what it is set to belongs to the identity of the text encoders.
    """

    denoiser_name: ClassVar[str] = "transformer"
    t5_tokenizer: ClassVar[str]
    default_sequence_length: ClassVar[int]
    default_max_shift: ClassVar[float]  # what the pipeline assumes where its scheduler does not say
    #: Whether the pipeline gives its scheduler evenly spaced levels, or leaves them to it.
    spaces_levels: ClassVar[bool] = False

    def __init__(self, pipeline: DiffusionPipeline, **options: Any) -> None:
        self.max_sequence_length = self.default_sequence_length
        super().__init__(pipeline, **options)

    def configure(self, *, max_prompt_tokens: int | None = None, guidance_embedding: float | None = None) -> None:
        if max_prompt_tokens is not None:
            self.max_sequence_length = max_prompt_tokens
        super().configure(guidance_embedding=guidance_embedding)

    @property
    def size_multiple(self) -> int:
        return self.vae_scale_factor * PATCH

    @property
    def prompt_reader(self) -> tuple[PreTrainedTokenizerBase | None, int]:
        tokenizer = getattr(self.pipeline, self.t5_tokenizer)
        return (tokenizer, self.max_sequence_length) if tokenizer is not None else super().prompt_reader

    def prompt_flags(self) -> dict[str, bool | int]:
        return {"max_sequence_length": self.max_sequence_length}

    def time_shift(self, latent_shape: tuple[int, int]) -> float:
        """From the scheduler: the static ``shift``, or the dynamic one of this many tokens.

        Dynamic shifting interpolates mu linearly between two token counts (256 and 4096 in FLUX.1-dev); the factor is
        exp(mu), or mu itself where ``time_shift_type`` is ``linear``.
        """
        config: Any = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        height, width = latent_shape
        tokens = (height // PATCH) * (width // PATCH)
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", self.default_max_shift)
        mu = low + (high - low) * (tokens - few) / (many - few)
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    def sampling_grid(self, schedule: Schedule, steps: int, latent_shape: tuple[int, int]) -> SamplingGrid:
        """As the pipeline asks its scheduler for them, shift included."""
        scheduler: Any = type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)
        dynamic = scheduler.config.get("use_dynamic_shifting")
        mu = self.time_shift(latent_shape) if dynamic else None
        if mu is not None and scheduler.config.get("time_shift_type", "exponential") == "exponential":
            mu = math.log(mu)
        evenly = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(**({"sigmas": evenly} if self.spaces_levels else {"num_inference_steps": steps}), mu=mu)
        return flow_grid(scheduler.sigmas.double().clamp(max=1.0), schedule.num_timesteps)

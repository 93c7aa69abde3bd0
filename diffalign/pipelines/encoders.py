"""The VAE and the text encoders of a pipeline: pictures to latents and back, in and out of memory, who they are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError
from .identity import text_identity, vae_identity
from .pixels import check_pixels


class Encoders:
    """The part of a :class:`.PipelineAdapter` that is needed before and after the denoiser.

    Args:
        pipeline: a loaded diffusers pipeline, whose VAE and text encoders may be None.
        vae_dtype: precision in which images are encoded and decoded.
    """

    text_encoder_names: ClassVar[tuple[str, ...]]
    tokenizer_names: ClassVar[tuple[str, ...]]
    #: Text encoders that the pipeline itself can do without.
    optional_encoder_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: DiffusionPipeline, vae_dtype: torch.dtype) -> None:
        self.pipeline = pipeline
        self.vae_dtype = vae_dtype
        # Kept apart from the VAE, which may leave memory before its scale is last needed.
        self._vae_config: dict[str, Any] | None = None if pipeline.vae is None else dict(pipeline.vae.config)
        self._absent = {name for name in self.optional_encoder_names if getattr(pipeline, name) is None}

    @property
    def vae_dtype(self) -> torch.dtype:
        """Precision in which images are encoded and decoded; may be set."""
        return self._vae_dtype

    @vae_dtype.setter
    def vae_dtype(self, dtype: torch.dtype) -> None:
        self._vae_dtype = dtype
        self._vae_copy: AutoencoderKL | None = None
        self._identity: dict[str, str | None] | None = None

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Those that are loaded."""
        return [e for name in self.text_encoder_names if (e := getattr(self.pipeline, name)) is not None]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(self.pipeline.vae_scale_factor)

    @property
    def prompt_reader(self) -> tuple[PreTrainedTokenizerBase | None, int]:
        """The tokenizer that reads most of a prompt (None when it is not loaded), and how many tokens it reads."""
        tokenizer = getattr(self.pipeline, self.tokenizer_names[0])
        return tokenizer, 0 if tokenizer is None else int(tokenizer.model_max_length)

    @property
    def missing_encoders(self) -> list[str]:
        """Names of the VAE and text encoders that are not loaded, without those the pipeline came without by choice."""
        names = ("vae", *self.text_encoder_names)
        return [name for name in names if getattr(self.pipeline, name) is None and name not in self._absent]

    def prompt_flags(self) -> dict[str, bool | int]:
        """Whatever else than encoders and tokenizers decides a prompt's tensors; part of the encoders' identity."""
        # SDXL's own switch between zeros and the encoded "" changes what the empty prompt becomes
        return {"zeros": bool(self.pipeline.config.get("force_zeros_for_empty_prompt", False))}

    # --- images ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Posterior of the VAE, unscaled.

        Args:
            pixels: (N, 3, H, W) floating point in [-1, 1], H and W multiples of the VAE's scale factor.

        Returns:
            (N, 2c, h, w) fp32 on the CPU: mean, then log variance.

        Raises:
            DataError: integers, values outside [-1, 1], NaN, or 8-bit images scaled to [0, 1].
            ConfigError: the VAE is not loaded.
        """
        check_pixels(pixels, self.vae_scale_factor)
        vae = self._vae()
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return posterior.parameters.float().cpu()

    def latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents, as the denoiser knows them.

        Args:
            moments: (N, 2c, h, w) from :meth:`encode_images`.
            noise: (N, c, h, w) standard normal to sample the posterior with; None takes its mean.

        Returns:
            (N, c, h, w) fp32 on the device of ``moments``.
        """
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise is not None:
            # the bounds are those of diffusers' DiagonalGaussianDistribution
            mean = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise.float()
        shift, scale = self._latent_scale(mean)
        return (mean - shift) * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (N, c, h, w)."""
        return self.pipeline.image_processor.postprocess(self.decode_pixels(latents), output_type="pil")

    @torch.no_grad()
    def decode_pixels(self, latents: Tensor) -> Tensor:
        """(N, 3, H, W) fp32, about [-1, 1], of scaled latents (N, c, h, w)."""
        vae = self._vae()
        latents = latents.to(vae.device, torch.float32)
        shift, scale = self._latent_scale(latents)
        return vae.decode((latents / scale + shift).to(vae.dtype)).sample.float()

    def _latent_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """(shift, scale), each broadcastable to (N, c, h, w): latent = (vae output - shift) * scale."""
        config = self._vae_config
        if config is None:
            raise ConfigError(
                "this pipeline was loaded without its VAE, so the scale of its latents is unknown. Load it with the "
                "VAE; the encoders can be dropped afterwards (drop_encoders)."
            )
        scale = like.new_tensor(config["scaling_factor"])
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (like.new_tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
            return mean, scale / std
        return like.new_tensor(config.get("shift_factor") or 0.0), scale

    def _vae(self) -> AutoencoderKL:
        """The VAE in ``vae_dtype``."""
        own = self.pipeline.vae
        if own is None:
            raise ConfigError("the VAE is not loaded: load the whole pipeline, or use a complete cache.")
        if own.dtype == self.vae_dtype:
            return own
        if self._vae_copy is None or self._vae_copy.device != own.device:
            copy = type(own).from_config(own.config)
            copy.load_state_dict(own.state_dict())
            self._vae_copy = copy.to(own.device, self.vae_dtype).eval().requires_grad_(False)
        return self._vae_copy

    # --- encoders in and out of memory -------------------------------------------------------------------------

    def move_encoders(self, device: torch.device | str) -> None:
        """VAE and text encoders to a device."""
        self._vae_copy = None
        for module in (self.pipeline.vae, *self.text_encoders):
            if module is not None:
                module.to(device)

    def offload_encoders(self) -> None:
        """VAE and text encoders to the CPU."""
        self.move_encoders("cpu")

    def drop_encoders(self) -> None:
        """VAE and text encoders out of memory for good; scale and identity stay known."""
        self.encoder_identity()
        self._vae_copy = None
        for name in ("vae", *self.text_encoder_names):
            setattr(self.pipeline, name, None)

    def encoder_identity(self) -> dict[str, str | None]:
        """Hashes of what images and prompts are encoded with: ``{"vae": ..., "text": ...}``.

        They cover weights, configurations, tokenizers and the precision of the VAE, and are computed once. A part that
        was never loaded is None.
        """
        if self._identity is None:
            pipeline = self.pipeline
            names = zip(self.text_encoder_names, self.tokenizer_names, strict=True)
            # an encoder the pipeline came without is left out together with its tokenizer, which nobody then asks
            tokenizers = [getattr(pipeline, tokenizer) for name, tokenizer in names if name not in self._absent]
            complete = len(self.text_encoders) == len([t for t in tokenizers if t is not None]) > 0
            self._identity = {
                "vae": None if pipeline.vae is None else vae_identity(pipeline.vae, self.vae_dtype),
                "text": text_identity(self.text_encoders, tokenizers, self.prompt_flags()) if complete else None,
            }
        return dict(self._identity)

    def _require_text_encoders(self) -> None:
        if not self.text_encoders:
            raise ConfigError("the text encoders are not loaded: load the whole pipeline, or use a complete cache.")

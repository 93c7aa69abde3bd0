"""What a trainer needs of a diffusers pipeline, whatever its family.

A family is one file: subclass :class:`PipelineAdapter`, name the pipeline classes it is for, and say how prompts become
tensors and how the denoiser is called. Importing the file registers it; docs/pipelines.md shows one.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.utils import is_xformers_available
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..diffusion import SamplingGrid, Schedule, noise_grid, schedule_from
from ..errors import ConfigError
from .identity import text_identity, vae_identity
from .names import Original
from .pixels import check_pixels

log = logging.getLogger(__name__)

ATTENTION = ("sdpa", "xformers", "eager")
_FAMILIES: dict[str, type[PipelineAdapter]] = {}


#: A diffusers network: a module, its configuration and its mixins (adapters, attention), which share no static type.
Denoiser = Any


class PipelineAdapter(ABC):
    """A pipeline seen by a trainer.

    Args:
        pipeline: a loaded diffusers pipeline. Its VAE and text encoders may be None when everything they would encode
            is cached already.
        vae_dtype: precision in which images are encoded and decoded. The pipeline's own VAE is never converted: when
            the precisions differ a converted copy is used.

    Raises:
        ConfigError: the denoiser does not take plain latents (an inpainting model, say).
    """

    family: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    denoiser_name: ClassVar[str] = "unet"
    text_encoder_names: ClassVar[tuple[str, ...]]
    tokenizer_names: ClassVar[tuple[str, ...]]
    #: Text encoders that the pipeline itself can do without.
    optional_encoder_names: ClassVar[tuple[str, ...]] = ()
    default_lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    #: kohya's name of the family's LoRA format; None where there is none, and no such file is written.
    kohya_network: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.__dict__.get("pipeline_classes", ()):
            _FAMILIES[name] = cls

    def __init__(self, pipeline: DiffusionPipeline, *, vae_dtype: torch.dtype = torch.float32) -> None:
        self.pipeline = pipeline
        self.vae_dtype = vae_dtype
        # Kept apart from the VAE, which may leave memory before its scale is last needed.
        self._vae_config: dict[str, Any] | None = None if pipeline.vae is None else dict(pipeline.vae.config)
        self._absent = {name for name in self.optional_encoder_names if getattr(pipeline, name) is None}
        if self.denoiser_channels("in") != self.latent_channels:
            raise ConfigError(
                f"the denoiser takes {self.denoiser_channels('in')} channels but latents have "
                f"{self.latent_channels}: inpainting and image-conditioned models cannot be aligned yet. Use a "
                "text-to-image model."
            )

    def configure(self, *, max_prompt_tokens: int | None = None, guidance_embedding: float | None = None) -> None:
        """Settings that only some families have; None leaves one as it is.

        Args:
            max_prompt_tokens: how many tokens T5 reads (SD3, FLUX); before anything is encoded.
            guidance_embedding: what a network with a guidance embedding (FLUX.1-dev) is told.

        Raises:
            ConfigError: this pipeline has no such setting.
        """
        for name, value in (("max_prompt_tokens", max_prompt_tokens), ("guidance_embedding", guidance_embedding)):
            if value is not None:
                raise ConfigError(f"{name}={value} has no effect on a {type(self.pipeline).__name__}: leave it out.")

    # --- the parts ---------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> Denoiser:
        """The network that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

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
    def latent_channels(self) -> int:
        """C of the latents."""
        return int(self._vae_config["latent_channels"] if self._vae_config else self.denoiser_channels("out"))

    def denoiser_channels(self, side: str) -> int:
        """Channels of the latents that the denoiser takes (``in``) or gives (``out``)."""
        return int(self.denoiser.config[f"{side}_channels"])

    @property
    def size_multiple(self) -> int:
        """Pixels that the edges of an image must be a multiple of: latent cell x downsampling of the denoiser."""
        blocks = self.denoiser.config.get("down_block_types") or ("one",)
        return self.vae_scale_factor * 2 ** (len(blocks) - 1)

    @property
    def native_resolution(self) -> int:
        """Edge in pixels of the square images the model was made for."""
        size = self.denoiser.config.sample_size
        return int(size if isinstance(size, int) else max(size)) * self.vae_scale_factor

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

    def noise_schedule(self, *, zero_terminal_snr: bool = False) -> Schedule:
        """The forward process of this model; see :func:`diffalign.diffusion.schedule_from`."""
        return schedule_from(self.pipeline.scheduler.config, zero_terminal_snr=zero_terminal_snr)

    def time_shift(self, latent_shape: tuple[int, int]) -> float:
        """Factor s of the scheduler's shift sigma' = s sigma / (1 + (s - 1) sigma) for latents (h, w).

        1 for variance-preserving models, which have no such shift.
        """
        return 1.0

    def sampling_grid(self, schedule: Schedule, steps: int, latent_shape: tuple[int, int]) -> SamplingGrid:
        """The noise levels that the pipeline visits when it draws latents (h, w) in ``steps`` steps.

        Args:
            schedule: what :meth:`noise_schedule` gave.
            steps: sampling steps.
            latent_shape: of the picture; moves the levels of flow models.
        """
        return noise_grid(schedule, self.pipeline.scheduler.config, steps)

    # --- what each family says ---------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Prompt tensors by name, (N, ...), fp32 on the CPU, without gradient; as the pipeline itself makes them."""

    @abstractmethod
    def unconditional(self) -> dict[str, Tensor]:
        """Tensors (1, ...) that the pipeline uses as the negative branch when no negative prompt is given."""

    @abstractmethod
    def call_denoiser(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        time: Tensor,
        conditioning: dict[str, Tensor],
        sizes: dict[str, Tensor],
    ) -> Tensor:
        """The family's part of :meth:`predict`: arguments are on one device and, times and sizes apart, in one dtype.

        Args:
            denoiser: policy or reference, maybe wrapped.
            noisy: (N, C, h, w).
            time: (N,) as :meth:`Schedule.time` gives it.
            conditioning: what :meth:`encode_prompts` gave, (N, ...).
            sizes: what :meth:`size_conditioning` gave.

        Returns:
            (N, C, h, w).
        """

    def size_conditioning(self, size_ids: Tensor) -> dict[str, Tensor]:
        """What the denoiser is told about image sizes.

        Args:
            size_ids: (N, 6) fp32: original height and width, crop top and left, target height and width, in pixels.

        Returns:
            Tensors by name; empty for families that are told nothing.
        """
        return {}

    def prompt_flags(self) -> dict[str, bool | int]:
        """Whatever else than encoders and tokenizers decides a prompt's tensors; part of the encoders' identity."""
        # SDXL's own switch between zeros and the encoded "" changes what the empty prompt becomes
        return {"zeros": bool(self.pipeline.config.get("force_zeros_for_empty_prompt", False))}

    def original_module(self, name: str) -> Original:
        """Where kohya's tools and ComfyUI look for a module of the denoiser.

        Raises:
            KeyError: they have no such module.
        """
        return Original(name, (name,))

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Tensor,
        time: Tensor,
        conditioning: dict[str, Tensor],
        size_ids: Tensor,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """One call of the network.

        Args:
            denoiser: policy or reference, maybe wrapped for several processes.
            noisy: (N, C, h, w), on the denoiser's device like all that follows.
            time: (N,) what the network is told of the timestep: ``schedule.time(t)``.
            conditioning: prompt tensors by name, (N, ...).
            size_ids: as in :meth:`size_conditioning`, always fp32.
            dtype: precision in which ``noisy`` and ``conditioning`` enter; None means that of ``conditioning``.

        Returns:
            (N, C, h, w) in the model's own space and dtype.
        """
        dtype = conditioning["prompt_embeds"].dtype if dtype is None else dtype
        cast = {name: value.to(dtype) for name, value in conditioning.items()}
        return self.call_denoiser(denoiser, noisy.to(dtype), time, cast, self.size_conditioning(size_ids))

    # --- sampling with the pipeline ----------------------------------------------------------------------------

    def sampling_arguments(
        self,
        conditioning: dict[str, Tensor],
        unconditional: dict[str, Tensor],
        noise: Tensor,
        guidance: float,
    ) -> dict[str, Any]:
        """Arguments of the pipeline's ``__call__`` that differ between families.

        Args:
            conditioning: prompt tensors by name, (N, ...).
            unconditional: those of the empty prompt, (1, ...) or (N, ...); used when ``guidance`` is above 1.
            noise: (N, C, h, w), of the size to draw.
            guidance: guidance scale.
        """
        negative = self._negative(unconditional, len(noise)) if guidance > 1 else {}
        return {**conditioning, **negative, "latents": noise, "guidance_scale": guidance}

    def sampled_latents(self, output: Tensor, latent_shape: tuple[int, int]) -> Tensor:
        """Latents (N, C, h, w) from what the pipeline returns for ``output_type="latent"``."""
        return output

    @staticmethod
    def _negative(unconditional: dict[str, Tensor], count: int) -> dict[str, Tensor]:
        return {f"negative_{name}": value.expand(count, *value.shape[1:]) for name, value in unconditional.items()}

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

    # --- attention ---------------------------------------------------------------------------------------------

    def set_attention(self, kind: str) -> None:
        """Choose the attention kernel of the denoiser; a reference copied or switched from it has the same one.

        Args:
            kind: ``sdpa`` (PyTorch's), ``xformers`` or ``eager`` (plain matrix products).

        Raises:
            ConfigError: an unknown kind, or xformers is not installed or cannot run here.
        """
        if kind not in ATTENTION:
            raise ConfigError(f"attention must be one of {', '.join(ATTENTION)}; got {kind!r}.")
        advice = "Install it (pip install 'diffalign[xformers]') or use attention=sdpa, as fast on current GPUs."
        if kind == "xformers" and not is_xformers_available():
            raise ConfigError(f"attention=xformers needs the package xformers, which is not installed. {advice}")
        try:
            self._set_attention(kind)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise ConfigError(f"attention={kind} cannot run here: {error} {advice}") from error

    def _set_attention(self, kind: str) -> None:
        """The family's part of :meth:`set_attention`, for a kind that is known and installed."""
        if kind == "xformers":
            self.denoiser.enable_xformers_memory_efficient_attention()
        else:
            self.denoiser.set_attn_processor(AttnProcessor2_0() if kind == "sdpa" else AttnProcessor())


def adapter_for(pipeline: DiffusionPipeline, *, vae_dtype: torch.dtype = torch.float32) -> PipelineAdapter:
    """The adapter of a pipeline's family.

    Raises:
        ConfigError: no family knows this pipeline class.
    """
    for cls in type(pipeline).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__](pipeline, vae_dtype=vae_dtype)
    raise ConfigError(
        f"{type(pipeline).__name__} is not supported. Supported: {', '.join(supported_pipelines())}. To add a family, "
        "subclass diffalign.pipelines.PipelineAdapter and import the file."
    )


def supported_pipelines() -> list[str]:
    """Names of the diffusers classes that have an adapter."""
    return sorted(_FAMILIES)

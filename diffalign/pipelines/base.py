"""What a trainer needs of a diffusers pipeline, whatever its family.

A family is one file: subclass :class:`PipelineAdapter`, name the pipeline classes it is for, and say how prompts become
tensors and how the denoiser is called. Importing the file registers it; docs/pipelines.md shows one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from ..diffusion import SamplingGrid, Schedule, noise_grid, schedule_from
from ..errors import ConfigError
from .encoders import Encoders
from .names import Original

ATTENTION = ("sdpa", "xformers", "eager")
_FAMILIES: dict[str, type[PipelineAdapter]] = {}


#: A diffusers network: a module, its configuration and its mixins (adapters, attention), which share no static type.
Denoiser = Any


class PipelineAdapter(Encoders, ABC):
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
    default_lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    #: kohya's name of the family's LoRA format; None where there is none, and no such file is written.
    kohya_network: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.__dict__.get("pipeline_classes", ()):
            _FAMILIES[name] = cls

    def __init__(self, pipeline: DiffusionPipeline, *, vae_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(pipeline, vae_dtype)
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
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the pipeline draws when it is told no size.

        Raises:
            ConfigError: the network's configuration holds none.
        """
        size = self.denoiser.config.get("sample_size")
        if size is None:
            raise ConfigError(
                f"the configuration of the {self.denoiser_name} has no sample_size, so the size of its pictures is "
                "unknown: give resolution, or height and width."
            )
        height, width = (size, size) if isinstance(size, int) else size
        return int(height) * self.vae_scale_factor, int(width) * self.vae_scale_factor

    @property
    def native_resolution(self) -> int:
        """Edge in pixels of the square images the model was made for.

        Raises:
            ConfigError: they are not square, or of unknown size.
        """
        height, width = self.native_size
        if height != width:
            raise ConfigError(
                f"this model draws pictures of {height} x {width} pixels, no squares: give resolution, or height and "
                "width."
            )
        return height

    def square_edge(self, resolution: int | None) -> int:
        """Edge in pixels of the square images that a run asks for; None means the model's own.

        Raises:
            ConfigError: the network cannot take this size.
        """
        edge = self.native_resolution if resolution is None else resolution
        if edge % self.size_multiple:
            raise ConfigError(f"resolution must be a multiple of {self.size_multiple} pixels; got {edge}.")
        return edge

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

"""Pictures from a pipeline, the same whatever the batch size.

The pipeline's own ``__call__`` does the sampling, so every scheduler and adapter works. Around it: prompts are encoded
once, each picture has a random generator of its own, and latents are decoded in fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.encoding import warn_of_cut_prompts
from ..errors import ConfigError
from ..pipelines import PipelineAdapter, adapter_for
from ..randomness import keyed_seed

log = logging.getLogger(__name__)

#: Marks in the ``info`` of a picture: it came out as NaN somewhere, or the safety checker blacked it out.
NOT_FINITE, UNSAFE = "not finite", "flagged by the safety checker"
_DECODE_PIXELS = 2**21  # decoded at once: two pictures of 1024 x 1024, whose fp32 activations take about 10 GB


def picture_seed(prompt: str, seed: int) -> int:
    """The seed of one picture's generator.

    Plain diffusers draws the same picture in fp32 with
    ``pipeline(prompt, generator=torch.Generator("cpu").manual_seed(picture_seed(prompt, seed)))``.
    Seed 0 of one prompt shares nothing with seed 0 of another.
    """
    return keyed_seed("picture", prompt, seed)


def generate_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
    progress: bool = False,
) -> list[Image.Image]:
    """Draw one picture for each (prompt, seed).

    Args:
        pipeline: of a family that has an adapter (docs/pipelines.md); left as it was found.
        prompts: N prompts; repeated ones are encoded once.
        seeds: N seeds; picture i depends on ``prompts[i]`` and ``seeds[i]`` alone (:func:`picture_seed`).
        steps: sampling steps.
        guidance: classifier-free guidance scale; at most 1 switches guidance off.
        batch_size: pictures drawn at once; a matter of speed and memory, never of content.
        height: pixels; None takes the pipeline's own.
        width: pixels; None takes the pipeline's own.
        progress: show a progress bar.

    Returns:
        N RGB images. Where an SD pipeline has a safety checker, flagged ones are black, and their number is logged.
        ``info`` of an image says when it was flagged, or held values that were not finite.

    Raises:
        ConfigError: the pipeline's family is not supported, a component is missing, or a setting is out of range.
    """
    batches = iterate_images(
        pipeline, prompts, seeds, steps=steps, guidance=guidance, batch_size=batch_size, height=height, width=width
    )
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc="pictures", unit="image", disable=not progress) as bar:
        for batch in batches:
            images += batch
            bar.update(len(batch))
    return images


def iterate_images(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    batch_size: int = 16,
    height: int | None = None,
    width: int | None = None,
) -> Iterator[list[Image.Image]]:
    """:func:`generate_images` batch by batch, for lists whose pictures do not fit in memory."""
    _check(prompts, seeds, steps, batch_size)
    adapter = adapter_for(pipeline)
    _check_parts(adapter)
    warn_of_cut_prompts(adapter, dict.fromkeys(prompts))
    encoder = _PromptEncoder(adapter, prompts)
    cell = adapter.vae_scale_factor
    height, width = height or adapter.native_resolution, width or adapter.native_resolution
    shape = (adapter.latent_channels, height // cell, width // cell)
    denoiser = adapter.denoiser
    with _quiet_inference(pipeline):
        empty = adapter.unconditional() if guidance > 1 else {}
        negative = {name: value.to(denoiser.device, denoiser.dtype) for name, value in empty.items()}
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, min(start + batch_size, len(prompts)))
            with torch.inference_mode():  # left before each yield: it would hold in the caller's code too
                generators = [
                    torch.Generator("cpu").manual_seed(picture_seed(prompt, seed))
                    for prompt, seed in zip(prompts[chosen], seeds[chosen], strict=True)
                ]
                # Drawn in fp32 on the CPU: every device and precision starts from the same noise.
                noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                noise = noise.to(denoiser.device, denoiser.dtype)
                output = pipeline(
                    **adapter.sampling_arguments(encoder(chosen), negative, noise, guidance),
                    generator=generators,  # stochastic schedulers draw on, each picture from its own
                    num_inference_steps=steps,
                    height=height,
                    width=width,
                    output_type="latent",
                )
                images = _decode(adapter, adapter.sampled_latents(output.images, shape[1:]))
            yield images


class _PromptEncoder:
    """Encodes each prompt once and forgets it after its last use."""

    def __init__(self, adapter: PipelineAdapter, prompts: Sequence[str]) -> None:
        self.adapter, self.prompts = adapter, prompts
        self.last_use = {prompt: index for index, prompt in enumerate(prompts)}
        self.cache: dict[str, dict[str, Tensor]] = {}

    def __call__(self, chosen: slice) -> dict[str, Tensor]:
        """Tensors (N, ...) of ``prompts[chosen]`` where the denoiser is."""
        batch, denoiser = self.prompts[chosen], self.adapter.denoiser
        missing = list(dict.fromkeys(prompt for prompt in batch if prompt not in self.cache))
        if missing:
            with _errors_alone():  # of each prompt that is cut, diffusers prints all that it leaves out
                encoded = self.adapter.encode_prompts(missing)
            for index, prompt in enumerate(missing):
                self.cache[prompt] = {
                    name: tensor[index].to(denoiser.device, denoiser.dtype) for name, tensor in encoded.items()
                }
        result = {name: torch.stack([self.cache[prompt][name] for prompt in batch]) for name in self.cache[batch[0]]}
        for prompt in batch:
            if self.last_use[prompt] < chosen.stop:
                self.cache.pop(prompt, None)
        return result


@contextmanager
def _errors_alone() -> Iterator[None]:
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _check(prompts: Sequence[str], seeds: Sequence[int], steps: int, batch_size: int) -> None:
    if isinstance(prompts, str):
        raise ConfigError("expected a list of prompts, got one string; put it in a list: [prompt].")
    if len(prompts) != len(seeds):
        raise ConfigError(f"expected one seed for each prompt, got {len(prompts)} prompts and {len(seeds)} seeds.")
    if steps < 1 or batch_size < 1:
        raise ConfigError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}.")


def _check_parts(adapter: PipelineAdapter) -> None:
    if adapter.missing_encoders:
        raise ConfigError(
            f"the pipeline has no {', '.join(adapter.missing_encoders)} (text encoder or VAE); load it whole to draw "
            "pictures from prompts."
        )


@contextmanager
def _quiet_inference(pipeline: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own, no dropout, the VAE in fp32; everything is put back afterwards."""
    bar = getattr(pipeline, "_progress_bar_config", None)
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    training = [m for module in modules for m in module.modules() if m.training]
    dtype = pipeline.vae.dtype
    with ExitStack() as stack:
        stack.callback(setattr, pipeline, "_progress_bar_config", bar if bar is not None else {})
        pipeline.set_progress_bar_config(disable=True)
        for part in training:
            stack.callback(setattr, part, "training", True)
        for module in modules:
            module.eval()
        if dtype != torch.float32:
            stack.callback(pipeline.vae.to, dtype=dtype)
            pipeline.vae.to(dtype=torch.float32)
        yield


def _decode(adapter: PipelineAdapter, latents: Tensor) -> list[Image.Image]:
    """Latents (N, c, h, w) to N images, a few at a time."""
    pipeline: Any = adapter.pipeline
    pixels = latents.shape[-2] * latents.shape[-1] * adapter.vae_scale_factor**2
    images: list[Image.Image] = []
    for part in latents.split(max(1, _DECODE_PIXELS // pixels)):
        decoded = adapter.decode_pixels(part)
        finite = decoded.isfinite().flatten(1).all(1).tolist()
        decoded, black = _safe(pipeline, decoded.nan_to_num(0.0, 0.0, 0.0))
        pictures = pipeline.image_processor.postprocess(
            decoded, output_type="pil", do_denormalize=[not flagged for flagged in black]
        )
        for picture, whole, flagged in zip(pictures, finite, black, strict=True):
            picture.info |= {NOT_FINITE: True} if not whole else {UNSAFE: True} if flagged else {}
        images += pictures
    return images


def _safe(pipeline: Any, decoded: Tensor) -> tuple[Tensor, list[bool]]:
    """The pipeline's safety checker, where it has one: flagged pictures come back as zeros, which stay black."""
    if getattr(pipeline, "safety_checker", None) is None:
        return decoded, [False] * len(decoded)
    dtype = next(pipeline.safety_checker.parameters()).dtype
    decoded, flagged = pipeline.run_safety_checker(decoded, decoded.device, dtype)
    if any(flagged):
        log.warning("the safety checker blacked out %d of %d pictures", sum(flagged), len(flagged))
    return decoded, list(flagged)

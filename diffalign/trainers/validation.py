"""Validation images: the same prompts and the same noise every time, base beside aligned, training left as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ..errors import ConfigError
from ..randomness import keyed_generator, keyed_normal

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..pipelines import PipelineAdapter
    from .config import TrainingConfig

MIN_CELL = 256  # pixels; smaller pictures are enlarged so that their labels can be read
MARGIN = 8


class Validation:
    """Draws, saves and keeps what a run needs to compare the policy with the base.

    Args:
        adapter: family of the pipeline; its VAE must still be loaded (it may rest on the CPU).
        prompts: what is drawn, one picture per prompt and seed.
        conditioning: encoded prompts by name, (N, ...), in the order of ``prompts``.
        unconditional: the empty prompt by name, (1, ...).
        output_dir: the run's folder; pictures go to ``validation/step-000100.png`` in it.
        seeds: seeds of each prompt.
        steps: sampling steps.
        guidance: guidance scale.
        autocast: context manager of the training's forward passes, for example ``accelerator.autocast``.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        prompts: Sequence[str],
        conditioning: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
        output_dir: str | Path,
        *,
        seeds: Sequence[int] = (0,),
        steps: int = 25,
        guidance: float = 5.0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.adapter, self.prompts, self.seeds = adapter, list(prompts), list(seeds)
        self.conditioning, self.unconditional = conditioning, unconditional
        self.folder = Path(output_dir) / "validation"
        self.steps, self.guidance, self.autocast = steps, guidance, autocast
        self.base_images: list[Image.Image] = []

    @classmethod
    def of_run(
        cls,
        adapter: PipelineAdapter,
        prompts: Sequence[Mapping[str, Tensor]],
        unconditional: Mapping[str, Tensor],
        config: TrainingConfig,
        output_dir: Path,
        *,
        autocast: Callable[[], AbstractContextManager],
    ) -> Validation:
        """What a run's settings ask for, from the embeddings of its prompts, without a batch dimension."""
        return cls(
            adapter,
            config.validation_prompts,
            {name: torch.stack([item[name] for item in prompts]) for name in prompts[0]},
            {name: value[None] for name, value in unconditional.items()},
            output_dir,
            steps=config.validation_steps,
            guidance=config.validation_guidance,
            autocast=autocast,
        )

    def draw(self, denoiser: nn.Module) -> list[Image.Image]:
        """Pictures of one denoiser, all seeds of the first prompt first."""
        return draw_validation(
            self.adapter,
            denoiser,
            self.prompts,
            self.conditioning,
            self.unconditional,
            seeds=self.seeds,
            steps=self.steps,
            guidance=self.guidance,
            autocast=self.autocast,
        )

    def prepare(self, denoiser: nn.Module, *, resumed: bool) -> None:
        """Draw the base's pictures before the first step, while the policy still is the base; or read them back.

        They rest in ``validation/base``, so no method needs a reference model for the sake of pictures.

        Raises:
            ConfigError: a resumed run was started without validation images, or with other ones.
        """
        files = [self.folder / "base" / f"{i:03d}.png" for i in range(len(self.prompts) * len(self.seeds))]
        record = self.folder / "base" / "drawn.json"
        drawn = {"prompts": self.prompts, "seeds": self.seeds, "steps": self.steps, "guidance": self.guidance}
        if not resumed:
            for file, image in zip(files, self.draw(denoiser), strict=True):
                save_image(image, file)
            record.write_text(json.dumps(drawn, indent=1))
        lost = [file for file in (record, *files) if not file.is_file()]
        if lost or json.loads(record.read_text()) != drawn:
            what = f"{lost[0]} is missing" if lost else f"{record} tells of other prompts or sampling settings"
            raise ConfigError(
                f"the base's validation images cannot be read back: {what}, and the weights are no longer the base's. "
                "Resume with the settings the run was started with, unset validate_every, or start anew in another "
                "output_dir."
            )
        self.base_images = []
        for file in files:
            with Image.open(file) as image:
                self.base_images.append(image.convert("RGB"))

    def run(self, step: int, denoiser: nn.Module) -> tuple[Path, list[Image.Image]]:
        """Draw the policy, put it beside the base, and save the sheet; call on the main process only.

        Args:
            step: optimizer steps done.
            denoiser: the policy, unwrapped, with the weights to show.

        Returns:
            The saved file and the policy's pictures.
        """
        images = self.draw(denoiser)
        labels = [prompt for prompt in self.prompts for _ in self.seeds]
        path = self.folder / f"step-{step:06d}.png"
        save_image(side_by_side(self.base_images, images, labels), path)
        return path, images


@torch.no_grad()
def draw_validation(
    adapter: PipelineAdapter,
    denoiser: nn.Module,
    prompts: Sequence[str],
    conditioning: Mapping[str, Tensor],
    unconditional: Mapping[str, Tensor],
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 25,
    guidance: float = 5.0,
    size: tuple[int, int] | None = None,
    batch_size: int = 4,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> list[Image.Image]:
    """Sample with the family's own pipeline from cached embeddings; text encoders are not needed.

    Noise is keyed by (seed, prompt): every call, batch size and machine starts from the same. Modes of the denoiser's
    modules, the global random generators, the pipeline's scheduler and the VAE's place are left as they were found.

    Args:
        adapter: family of the pipeline, with a loaded VAE.
        denoiser: what predicts, unwrapped, already on its device.
        prompts: N prompts.
        conditioning: encoded prompts by name, (N, ...).
        unconditional: the empty prompt by name, (1, ...); used when ``guidance`` is above 1.
        seeds: seeds of each prompt.
        steps: sampling steps.
        guidance: guidance scale.
        size: height and width in pixels; None takes the model's own.
        batch_size: pictures sampled at once.
        autocast: context manager around sampling.

    Returns:
        N x len(seeds) pictures, all seeds of the first prompt first.

    Raises:
        ConfigError: the VAE is gone, or the embeddings do not belong to the prompts.
    """
    _check(adapter, prompts, conditioning)
    height, width = size or adapter.native_size
    shape = (adapter.latent_channels, height // adapter.vae_scale_factor, width // adapter.vae_scale_factor)
    work = [(row, seed) for row in range(len(prompts)) for seed in seeds]
    first = next(denoiser.parameters())
    device, dtype = first.device, first.dtype
    latents = []
    with _undisturbed(denoiser, device), autocast():
        pipeline = _view(adapter, denoiser)
        for start in range(0, len(work), batch_size):
            part = work[start : start + batch_size]
            rows = torch.tensor([row for row, _ in part])
            prompt = {name: value[rows].to(device, dtype) for name, value in conditioning.items()}
            empty = {name: value.to(device, dtype) for name, value in unconditional.items()}
            keys = [(seed, prompts[row], "validation") for row, seed in part]
            noise = torch.stack([keyed_normal(shape, *key) for key in keys]).to(device, dtype)
            output = pipeline(
                **adapter.sampling_arguments(prompt, empty, noise, guidance),
                generator=[keyed_generator(*key, "sampler") for key in keys],  # for samplers that add noise
                num_inference_steps=steps,
                height=height,
                width=width,
                output_type="latent",
            )
            latents.append(adapter.sampled_latents(output.images, shape[1:]).float())
    return _decode(adapter, torch.cat(latents), device, batch_size)


def side_by_side(
    base_images: Sequence[Image.Image], policy_images: Sequence[Image.Image], prompts: Sequence[str]
) -> Image.Image:
    """One sheet: a row per picture with its prompt above, the base on the left and the aligned model on the right.

    Args:
        base_images: R pictures.
        policy_images: R pictures, drawn from the same noise.
        prompts: R prompts; long ones are wrapped.

    Raises:
        ValueError: the lists differ in length or are empty.
    """
    if not prompts or not len(base_images) == len(policy_images) == len(prompts):
        raise ValueError(
            "base_images, policy_images and prompts must be equally long and not empty; "
            f"got {len(base_images)}, {len(policy_images)} and {len(prompts)}."
        )
    font = ImageFont.load_default(14)
    rows = [(_enlarged(a), _enlarged(b), p) for a, b, p in zip(base_images, policy_images, prompts, strict=True)]
    width = max(a.width + b.width for a, b, _ in rows) + 3 * MARGIN
    line = int(font.getbbox("Ag")[3]) + 4
    texts = [_wrapped(prompt, font, width - 2 * MARGIN) for _, _, prompt in rows]
    heights = [
        len(text) * line + max(a.height, b.height) + 2 * MARGIN for text, (a, b, _) in zip(texts, rows, strict=True)
    ]
    sheet = Image.new("RGB", (width, line + 2 * MARGIN + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    right = 2 * MARGIN + max(a.width for a, _, _ in rows)
    pen.text((MARGIN, MARGIN), "base", fill="black", font=font)
    pen.text((right, MARGIN), "aligned", fill="black", font=font)
    top = line + 2 * MARGIN
    for text, (base, policy, _), height in zip(texts, rows, heights, strict=True):
        for number, words in enumerate(text):
            pen.text((MARGIN, top + number * line), words, fill="black", font=font)
        sheet.paste(base, (MARGIN, top + len(text) * line))
        sheet.paste(policy, (right, top + len(text) * line))
        top += height
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    image.save(partial, format="PNG")
    partial.replace(path)


def _check(adapter: PipelineAdapter, prompts: Sequence[str], conditioning: Mapping[str, Tensor]) -> None:
    if not prompts:
        raise ConfigError("validation images need prompts, got none: fill validation_prompts or unset validate_every.")
    for name, value in conditioning.items():
        if len(value) != len(prompts):
            raise ConfigError(f"{name} must hold one row per validation prompt ({len(prompts)}); got {len(value)}.")
    if adapter.pipeline.vae is None:
        raise ConfigError(
            "validation images need the VAE, which has been dropped. Keep it (it may rest on the CPU), or unset "
            "validate_every."
        )


def _view(adapter: PipelineAdapter, denoiser: nn.Module) -> DiffusionPipeline:
    """The pipeline with ``denoiser`` alone: no other model is touched, and its device is the denoiser's.

    A shallow copy keeps what the family set up in its constructor; assigning a component changes the copy only.
    """
    view = copy.copy(adapter.pipeline)
    for name, component in adapter.pipeline.components.items():
        if isinstance(component, nn.Module):
            setattr(view, name, denoiser if name == adapter.denoiser_name else None)
    view.scheduler = type(view.scheduler).from_config(view.scheduler.config)
    view.set_progress_bar_config(disable=True)
    return view


@contextmanager
def _undisturbed(denoiser: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own mode and the global generators are as before."""
    modes = {module: module.training for module in denoiser.modules()}
    denoiser.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _decode(adapter: PipelineAdapter, latents: Tensor, device: torch.device, batch_size: int) -> list[Image.Image]:
    """Pictures of latents; a VAE that rests elsewhere is on ``device`` only meanwhile."""
    vae = adapter.pipeline.vae
    home = next(vae.parameters()).device
    if home == device:
        return [image for part in latents.split(batch_size) for image in adapter.decode(part)]
    vae.to(device)
    try:
        return [image for part in latents.split(batch_size) for image in adapter.decode(part)]
    finally:
        adapter.move_encoders(home)  # also frees the adapter's converted copy


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-MIN_CELL // image.width) if image.width < MIN_CELL else 1
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels; a word longer than a line is cut."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width or n == 1)
            lines += [word[:cut], ""]
            word = word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line] or [""]

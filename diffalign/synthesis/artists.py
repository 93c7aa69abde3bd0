"""Whatever draws: a pipeline as its settings describe it, its LoRA on top, and what happens when it fails."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, schedulers
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from huggingface_hub import snapshot_download, try_to_load_from_cache
from PIL import Image

from ..errors import ConfigError, DataError, DiffalignError
from ..pipelines import load_pipeline, supported_pipelines
from ..pipelines.hub import model_licence
from ..randomness import keyed_seed
from .card import public_name
from .config import PipelineSpec
from .sampling import iterate_images, picture_seed

log = logging.getLogger(__name__)

# What a pipeline may raise because of one prompt. Running out of memory is among them, and is no prompt's fault.
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError, OverflowError)


def local_device() -> str:
    """The device of this process."""
    if torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    return "cpu"


class Artist:
    """A pipeline, ready to draw.

    Args:
        name: key of the seeds.
        spec: settings.
        device: where it runs.

    Raises:
        ConfigError: the model, its LoRA or its scheduler cannot be used.
    """

    def __init__(self, name: str, spec: PipelineSpec, device: str) -> None:
        self.name, self.spec = name, spec
        dtype = spec.dtype or ("fp16" if device.startswith("cuda") else "fp32")
        pipeline = load_pipeline(
            spec.model, dtype=dtype, revision=spec.revision, variant=spec.variant, config=spec.config
        ).to(device)
        self._open = ExitStack()
        if spec.lora is not None:
            _put_on(pipeline, spec, self._open)
        self.pipeline = prepared(pipeline, spec)
        self._revision = resolved_revision(spec)

    def source(self, prompt: str, index: int, seed: int) -> dict[str, Any]:
        """Where picture ``index`` of a prompt comes from, in the schema's keys."""
        spec = self.spec
        return {
            "model": model_name(spec),
            "revision": self._revision,
            "seed": picture_seed(drawn_prompt(spec, prompt), candidate_seed(seed, self.name, index)),
            "steps": spec.steps,
            "guidance": spec.guidance,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "pipeline": self.name,
        }

    def draw(self, prompts: Sequence[str], seed: int) -> Iterator[Image.Image | str]:
        """``spec.images`` pictures of each prompt, prompt by prompt; in place of a picture that failed, the reason.

        Raises:
            DataError: the pipeline draws nothing any more, whatever the prompt.
        """
        texts = [drawn_prompt(self.spec, prompt) for prompt in prompts for _ in range(self.spec.images)]
        seeds = [candidate_seed(seed, self.name, i) for _ in prompts for i in range(self.spec.images)]
        start = 0
        while start < len(texts):
            try:
                for images in self._iterate(texts[start:], seeds[start:], self.spec.batch_size):
                    yield from images
                    start += len(images)
            except _FAILURES as error:
                _reraise(error)
                stop = min(start + self.spec.batch_size, len(texts))
                yield from self._one_by_one(texts[start:stop], seeds[start:stop])
                start = stop

    def _one_by_one(self, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image | str]:
        """A batch that failed again, to find whose fault it is: a prompt's, or the pipeline's own."""
        drawn: list[Image.Image | str] = []
        for text, seed in zip(texts, seeds, strict=True):
            try:
                drawn += next(self._iterate([text], [seed], 1))
            except _FAILURES as error:
                _reraise(error)
                log.warning("pipeline %s cannot draw %.80r: %s", self.name, text, _line(error))
                drawn.append(f"drawing failed: {_line(error)}")
        if any(isinstance(picture, str) for picture in drawn):
            try:
                next(self._iterate([""], [0], 1))
            except _FAILURES as error:
                raise DataError(
                    f"pipeline {self.name} draws nothing any more, not even an empty prompt: {_line(error)}. What was "
                    "drawn before is safe; repair the pipeline and run again."
                ) from error
        return drawn

    def _iterate(self, texts: Sequence[str], seeds: Sequence[int], batch_size: int) -> Iterator[list[Image.Image]]:
        spec = self.spec
        if type(self.pipeline).__name__ in supported_pipelines():
            return iterate_images(
                self.pipeline, texts, seeds, steps=spec.steps, guidance=spec.guidance, batch_size=batch_size,
                height=spec.height, width=spec.width,
            )  # fmt: skip
        return _iterate_plain(self.pipeline, texts, seeds, spec, batch_size)

    def close(self) -> None:
        """Take the LoRA off."""
        self._open.close()


def candidate_seed(seed: int, pipeline: str, index: int) -> int:
    """Key of picture ``index`` of a pipeline, before the prompt is mixed in (:func:`.sampling.picture_seed`)."""
    return keyed_seed(seed, "candidate", pipeline, index)


def drawn_prompt(spec: PipelineSpec, prompt: str) -> str:
    """What the model is told; braces in the prompt itself mean nothing."""
    return spec.prompt.replace("{prompt}", prompt)


def model_name(spec: PipelineSpec) -> str:
    """The model, and what is on top of it, as it is published: without folders of this machine."""
    return " + ".join(public_name(part) for part in (spec.model, spec.lora) if part is not None)


def resolved_revision(spec: PipelineSpec) -> str | None:
    """The commit that was loaded from the hub, else what was asked for."""
    if spec.model.count("/") == 1 and not Path(spec.model).exists():
        found = try_to_load_from_cache(spec.model, "model_index.json", revision=spec.revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return spec.revision


def licence_of(spec: PipelineSpec) -> str | None:
    """Licence id of a model: as set, or from its card where one is at hand."""
    return spec.license if spec.license is not None else model_licence(spec.model)


def prepared(pipeline: DiffusionPipeline, spec: PipelineSpec) -> Any:
    """The text-to-image form of a pipeline with the scheduler asked for, quiet, decoding a few pictures at a time."""
    pipe: Any = pipeline
    classes = set(AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values())
    if type(pipe) not in classes and type(pipe).__name__ not in supported_pipelines():
        try:
            pipe = AutoPipelineForText2Image.from_pipe(pipe)
        except ValueError:  # no such form is known: a pipeline of its own kind, which may well take prompts
            log.info("%s is no text-to-image class that diffusers lists; used as it is", type(pipe).__name__)
    if spec.scheduler is not None:
        made = getattr(schedulers, spec.scheduler)
        own = {cls.__name__ for cls in getattr(pipe.scheduler, "compatibles", [])}
        if own and spec.scheduler not in own:
            raise ConfigError(
                f"scheduler={spec.scheduler} does not fit {spec.model}; expected one of {', '.join(sorted(own))}."
            )
        pipe.scheduler = made.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    # Where there is an adapter, `_decode` of sampling.py takes as many at a time as fit; one by one costs small models
    # up to a tenth of the whole time.
    if type(pipe).__name__ not in supported_pipelines() and hasattr(getattr(pipe, "vae", None), "enable_slicing"):
        pipe.vae.enable_slicing()
    return pipe


def _put_on(pipeline: DiffusionPipeline, spec: PipelineSpec, stack: ExitStack) -> None:
    """Load the LoRA and make sure that it arrived."""
    from ..evaluation.lora import find_weights, lora_loaded  # late: evaluation draws with this package

    assert spec.lora is not None
    path: str | Path = spec.lora
    if not Path(path).exists() and spec.lora.count("/") == 1 and not spec.lora.startswith("."):
        try:
            path = snapshot_download(spec.lora, allow_patterns=["*.safetensors"])
        except (OSError, ValueError) as error:
            raise ConfigError(f"there is no LoRA {spec.lora} here, and the hub's cannot be read: {error}") from error
    kind, file = find_weights(path)
    if kind != "lora":
        raise ConfigError(f"lora={spec.lora} is a whole pipeline: give it as `model`, and no `lora`.")
    stack.enter_context(lora_loaded(pipeline, file))
    pipe: Any = pipeline
    pipe.set_adapters("aligned", spec.lora_scale)


def _iterate_plain(
    pipeline: Any, texts: Sequence[str], seeds: Sequence[int], spec: PipelineSpec, batch_size: int
) -> Iterator[list[Image.Image]]:
    """Any text-to-image pipeline of diffusers, through its own call; each picture has a generator of its own."""
    options: dict[str, Any] = {n: v for n, v in (("height", spec.height), ("width", spec.width)) if v is not None}
    known = inspect.signature(pipeline.__call__).parameters
    guided = next((name for name in ("guidance_scale", "prior_guidance_scale") if name in known), None)
    if guided is None:
        raise ConfigError(f"{type(pipeline).__name__} takes no guidance_scale, so it cannot be drawn with.")
    options[guided] = spec.guidance
    for start in range(0, len(texts), batch_size):
        chosen = slice(start, start + batch_size)
        generators = [
            torch.Generator("cpu").manual_seed(picture_seed(text, seed))
            for text, seed in zip(texts[chosen], seeds[chosen], strict=True)
        ]
        with torch.inference_mode():
            output = pipeline(
                prompt=list(texts[chosen]),
                generator=generators,
                num_inference_steps=spec.steps,
                **options,
            )
        yield list(output.images)


def _reraise(error: Exception) -> None:
    """Errors that are no prompt's fault go on."""
    if isinstance(error, DiffalignError) or type(error).__name__ == "OutOfMemoryError":
        raise error


def _line(error: Exception) -> str:
    return " ".join((str(error).strip().splitlines() or [""])[0].split())[:200] or type(error).__name__

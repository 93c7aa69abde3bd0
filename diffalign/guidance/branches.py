"""Answers a denoiser's calls while a pipeline samples, each branch of guidance by its own network.

diffusers' pipelines guide in one of two ways. SD, SDXL and SD3 stack both branches into one call, the negative half
first. FLUX makes two calls, each inside ``denoiser.cache_context("cond" | "uncond")``. Both are intercepted at the
denoiser, so the pipeline's own code, scheduler and callbacks stay as they are.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..pipelines import PipelineAdapter

log = logging.getLogger(__name__)

Inputs = dict[str, Any]
Forward = Callable[..., Any]
_TEXT = ("encoder_hidden_states", "pooled_projections", "txt_ids")  # what a transformer is told of the prompt


class Branches:
    """What stands between the pipeline and its denoiser.

    Args:
        adapter: of the pipeline.
        negative_call: ``(forward, inputs) -> output`` of the negative network; ``forward`` is the pipeline's own.
        before_positive: called before each pass of the positive network.
        texts: prompt tensors (1, ...) that replace the negative branch's own, by the names of ``encode_prompts``;
            None leaves them as the pipeline made them, ``"prompt"`` gives it the prompt.
        rescale: phi of Lin et al. 2023 (2305.08891, section 3.4); 0 does nothing.
        interval: the part of sampling, from 0 (noise) to 1, during which guidance acts.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        negative_call: Callable[[Forward, Inputs], Any],
        before_positive: Callable[[], None],
        *,
        texts: dict[str, Tensor] | str | None,
        rescale: float,
        interval: tuple[float, float],
    ) -> None:
        self.pipeline: Any = adapter.pipeline
        self.stacked = hasattr(type(adapter.pipeline), "do_classifier_free_guidance")
        self.time_scale = 1000 if adapter.family == "flux" else 1  # FLUX is told the timestep in thousandths
        self.negative_call, self.before_positive = negative_call, before_positive
        self.texts, self.rescale, self.interval = texts, rescale, interval
        self.announced: str | None = None  # the branch that the pipeline says it is in, where it says so
        self.positive_calls = self.negative_calls = self.skipped_calls = 0
        self._prompt: Inputs = {}
        self._conditional: Tensor | None = None
        self._schedulers: list[Any] = []

    def answer(self, forward: Forward, inputs: Inputs) -> Any:
        """The output of one call of the denoiser.

        Args:
            forward: the network itself.
            inputs: arguments of its ``forward`` by name.
        """
        if self.rescale:
            self._rescale_in(self.pipeline.scheduler)
        if not self.stacked:
            return self._announced_call(forward, inputs)
        guided = self.pipeline.do_classifier_free_guidance and inputs.get("skip_layers") is None
        if not guided:
            # SD3's third pass with skipped layers belongs to the conditional prediction, already taken
            return self._positive(forward, inputs, keep=inputs.get("skip_layers") is None)
        negative, positive = _halves(inputs)
        conditional = self._positive(forward, positive)
        other = conditional if self._skipped(inputs) else self._negative(forward, negative)
        return _like(conditional, torch.cat([other[0], conditional[0]]))

    def _announced_call(self, forward: Forward, inputs: Inputs) -> Any:
        if self.announced != "uncond":
            return self._positive(forward, inputs)
        if self._skipped(inputs):
            return (self._conditional,)
        return self._negative(forward, inputs)

    def _positive(self, forward: Forward, inputs: Inputs, *, keep: bool = True) -> Any:
        self.positive_calls += 1
        self.before_positive()
        output = forward(**inputs)
        if keep:
            self._prompt, self._conditional = inputs, output[0]
        return output

    def _negative(self, forward: Forward, inputs: Inputs) -> Any:
        self.negative_calls += 1
        return self.negative_call(forward, inputs | self._text(inputs))

    def _text(self, inputs: Inputs) -> Inputs:
        """What the negative branch is told instead of the pipeline's negative prompt."""
        if self.texts is None:
            return {}
        added = inputs.get("added_cond_kwargs") or {}
        if isinstance(self.texts, str):
            given = {name: self._prompt[name] for name in _TEXT if self._prompt.get(name) is not None}
            pooled = (self._prompt.get("added_cond_kwargs") or {}).get("text_embeds")
        else:
            told = inputs["encoder_hidden_states"]
            tensors = {
                name: value.to(told.device, told.dtype).expand(len(told), *value.shape[1:])
                for name, value in self.texts.items()
            }
            given = {"encoder_hidden_states": tensors["prompt_embeds"]}
            pooled = tensors.get("pooled_prompt_embeds")
            if "pooled_projections" in inputs:
                given["pooled_projections"] = pooled
            if "txt_ids" in inputs:
                given["txt_ids"] = inputs["txt_ids"].new_zeros(tensors["prompt_embeds"].shape[1], 3)
        return given | ({"added_cond_kwargs": added | {"text_embeds": pooled}} if "text_embeds" in added else {})

    # --- interval and rescale ------------------------------------------------------------------------------------

    def _skipped(self, inputs: Inputs) -> bool:
        """Whether this step lies outside the interval; both branches are then the conditional prediction."""
        first, last = self.interval
        if first <= 0 and last >= 1:
            return False
        time = torch.as_tensor(inputs["timestep"]).flatten()[0].float() * self.time_scale
        steps = self.pipeline.scheduler.timesteps.float()
        place = float((steps - time.to(steps.device)).abs().argmin()) / len(steps)
        outside = not first <= place < last
        self.skipped_calls += outside
        return outside

    def _rescale_in(self, scheduler: Any) -> None:
        """Give the guided prediction back the conditional one's spread where the scheduler receives it.

        There every family's prediction is at hand whole; FLUX keeps its scale of guidance to itself.
        """
        if getattr(self.pipeline, "guidance_rescale", 0):
            raise ConfigError("guidance_rescale is given to the pipeline and rescale to negative_guidance: give one.")
        if "step" in scheduler.__dict__:
            return
        step = scheduler.step

        def rescaled(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
            plain = self._conditional
            if plain is not None and plain.shape == model_output.shape:
                model_output = rescale_guided(model_output, plain, self.rescale)
            return step(model_output, *args, **kwargs)

        scheduler.step = rescaled
        self._schedulers.append(scheduler)

    def close(self) -> None:
        """Put the schedulers back, and say so when the negative model had no part in what was drawn."""
        for scheduler in self._schedulers:
            scheduler.__dict__.pop("step", None)
        if self.positive_calls and not self.negative_calls and not self.skipped_calls:
            log.warning(
                "the negative model was never called: without guidance there is no negative branch. Use a guidance "
                "scale above 1 (FLUX: true_cfg_scale above 1 and a negative_prompt, which may be empty)."
            )


def rescale_guided(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """phi std(conditional) / std(guided) guided + (1 - phi) guided, each item's spread over all but the batch.

    Lin et al. 2023 (2305.08891), Eq. 15 and 16.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.float().std(axes, keepdim=True) / guided.float().std(axes, keepdim=True)
    return (guided.float() * (phi * ratio + 1 - phi)).to(guided.dtype)


@contextmanager
def answered_by(denoiser: nn.Module, branches: Branches) -> Iterator[None]:
    """``branches`` answers every call of the denoiser inside the block.

    The instance's class is exchanged for a subclass with another ``__call__``. Replacing ``forward`` would not last:
    accelerate's offloading puts its own back after each picture.
    """
    own: Any = type(denoiser)
    parameters = inspect.signature(own.forward)

    class Answered(own):
        answered_by = branches

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            inputs = dict(parameters.bind(self, *args, **kwargs).arguments)
            inputs.pop("self")
            return branches.answer(super().__call__, inputs)

        def cache_context(self, name: str, **kwargs: Any) -> AbstractContextManager[None]:
            @contextmanager
            def announced() -> Iterator[None]:
                branches.announced = name
                try:
                    with super(Answered, self).cache_context(name, **kwargs):
                        yield
                finally:
                    branches.announced = None

            return announced()

    # diffusers looks networks up by the name of their class
    Answered.__name__, Answered.__qualname__, Answered.__module__ = own.__name__, own.__qualname__, own.__module__
    network: Any = denoiser
    network.__class__ = Answered
    try:
        yield
    finally:
        network.__class__ = own
        branches.close()


def _halves(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Both branches of a stacked call: every tensor with an entry per item is cut in two, the rest goes to both."""
    items = len(inputs["sample"] if "sample" in inputs else inputs["hidden_states"])

    def half(value: Any, second: bool) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == items:
            return value.chunk(2)[second]
        if isinstance(value, dict):
            return {name: half(part, second) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(half(part, second) for part in value)
        return value

    return tuple({name: half(value, second) for name, value in inputs.items()} for second in (False, True))  # type: ignore[return-value]


def _like(output: Any, sample: Tensor) -> Any:
    """``sample`` in the form in which the network answered."""
    return (sample,) if isinstance(output, tuple) else type(output)(sample=sample)

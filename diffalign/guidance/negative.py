"""The context in which a pipeline's unconditional branch is predicted by a negative model.

With eps_pos and eps_neg two networks of one architecture, c the prompt and c' the negative prompt, guidance becomes

    eps = eps_neg(x, t, c') + g (eps_pos(x, t, c) - eps_neg(x, t, c'))

(Diffusion-NPO, 2505.11245). Classifier-free guidance is the case of equal networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..evaluation.lora import find_weights
from ..pipelines import PipelineAdapter, adapter_for
from .adapters import NEGATIVE, POSITIVE, AdapterSwitch, active_adapters, attached, uses_dora
from .branches import Branches, Forward, Inputs, answered_by
from .export import EXPORT_FILE, Exported, read_export
from .mixing import Weights, base_weights, merged_weights, mix_weights, network_of, require_same

Model: TypeAlias = str | Path | nn.Module | DiffusionPipeline
EMBEDDINGS = ("default", "empty", "zeros", "prompt")


@contextmanager
def negative_guidance(
    pipeline: DiffusionPipeline,
    negative: Model,
    positive: Model | None = None,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    rescale: float | None = None,
    interval: tuple[float, float] | None = None,
    embedding: str | None = None,
) -> Iterator[Branches]:
    """Inside the block the pipeline's guidance is relative to a negative model; outside all is as before.

        with negative_guidance(pipe, "out/npo"):
            images = pipe(prompt, guidance_scale=5).images

    Works in the SD, SDXL, SD3 and FLUX pipelines of diffusers and in :func:`diffalign.synthesis.generate_images`. As
    without it, a guidance scale of at most 1 asks for no negative prediction: the negative model is not called. FLUX
    guides only with ``true_cfg_scale`` above 1 and a ``negative_prompt`` (which may be ""); ``generate_images`` sees
    to that.

    Where both models are LoRAs, one copy of the base weights serves both branches, with other adapters active in each.
    A whole model is a second network in memory. Either way the negative branch's weights are

        base + alpha (positive - base) + beta (negative - base).

    Args:
        pipeline: holds the base. If adapters are active in it, those are the positive model.
        negative: what preference training with ``negative=true`` or Self-NPO made: the folder of a run, a LoRA, a
            pipeline folder, what :func:`export_negative` wrote, or a loaded denoiser or pipeline, also this one: that
            is plain guidance.
        positive: the aligned model, active in the conditional branch; None takes the pipeline as it is.
        alpha: share of the positive change in the negative branch; None means 0, or what was exported. Published
            programs call 1 - alpha ``merge_weight``. If the *pipeline itself* is the aligned model, and no adapter of
            it, a LoRA acts on top of it and alpha has nothing to do.
        beta: share of the negative change; None means 1, or what was exported.
        rescale: phi of guidance rescale (2305.08891), 0 to 1, in every family; None means 0, or what was exported.
        interval: guide only in this part of sampling, from 0 (noise) up to, not with, 1 (picture): step i of n lies at
            i / n. Elsewhere the conditional prediction is used alone and the negative model is not called. None means
            (0, 1), or what was exported.
        embedding: what the negative branch is told: ``default`` (what the pipeline makes: the negative prompt, or for
            SDXL zeros where it has ``force_zeros_for_empty_prompt``), ``empty`` (the encoded ""), ``zeros``, or
            ``prompt`` (the same as the positive branch). None means ``default``, or what was exported.

    Yields:
        A handle whose ``positive_calls`` and ``negative_calls`` count the passes of each network.

    Raises:
        ConfigError: a setting out of range, or one that would have no effect.
        CheckpointError: a model that cannot be read or does not fit.
    """
    exported = Exported()
    if isinstance(negative, (str, Path)) and (Path(negative) / EXPORT_FILE).is_file():
        exported, negative, exported_positive = read_export(Path(negative))
        positive = exported_positive if positive is None else positive
    given: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "rescale": rescale,
        "interval": interval,
        "embedding": embedding,
    }
    settings = replace(exported, **{name: value for name, value in given.items() if value is not None})
    check(settings)
    adapter = adapter_for(pipeline)
    if hasattr(adapter.denoiser, "answered_by"):
        raise ConfigError("negative_guidance is active in this pipeline already; leave that block first.")
    with ExitStack() as stack:
        negative_call, before_positive = _networks(stack, adapter, negative, positive, settings)
        branches = Branches(
            adapter,
            negative_call,
            before_positive,
            texts=_texts(adapter, settings.embedding),
            rescale=settings.rescale,
            interval=settings.interval,
        )
        stack.enter_context(answered_by(adapter.denoiser, branches))
        yield branches


def check(settings: Exported) -> None:
    """Refuse settings that cannot be meant.

    Raises:
        ConfigError: which, and what is allowed.
    """
    if settings.embedding not in EMBEDDINGS:
        raise ConfigError(f"embedding must be one of {', '.join(EMBEDDINGS)}; got {settings.embedding!r}.")
    if not 0 <= settings.rescale <= 1:
        raise ConfigError(f"rescale must lie in [0, 1]; got {settings.rescale}.")
    if len(settings.interval) != 2 or not 0 <= settings.interval[0] < settings.interval[1] <= 1:
        raise ConfigError(f"interval must be (first, last) with 0 <= first < last <= 1; got {settings.interval}.")


def negative_network(pipeline: DiffusionPipeline, negative: Model, positive: Model | None, settings: Exported) -> Any:
    """A network with the negative branch's weights, mixed in fp32; see :func:`negative_guidance` for the arguments."""
    adapter = adapter_for(pipeline)
    base = base_weights(adapter.denoiser)
    wanted = None
    if settings.alpha:
        _require_positive(adapter, positive)
        wanted = _weights(adapter, positive, POSITIVE)
    change = _weights(adapter, negative, NEGATIVE) if settings.beta else None
    mixed = mix_weights(base, positive=wanted, negative=change, alpha=settings.alpha, beta=settings.beta)
    return network_of(adapter.denoiser, mixed)


def _networks(
    stack: ExitStack, adapter: PipelineAdapter, negative: Model, positive: Model | None, settings: Exported
) -> tuple[Any, Any]:
    """How each branch predicts: a call of the negative network, and what comes before each of the positive one."""
    pipeline = adapter.pipeline
    own = active_adapters(adapter.denoiser)
    if positive is not None and own:
        raise ConfigError(
            f"positive is given, but the pipeline has adapters ({', '.join(own)}) active, which would be it. Leave out "
            "positive, or unload them."
        )
    negative_file, positive_file = _lora_file(negative), None if positive is None else _lora_file(positive)
    if negative_file is None or (positive is not None and positive_file is None):
        second = _second_network(adapter, negative, positive, settings)
    else:
        second = None
    if positive_file is not None:
        stack.enter_context(attached(pipeline, positive_file, POSITIVE, active=True))
    elif positive is not None:
        original = adapter.denoiser
        stack.callback(setattr, pipeline, adapter.denoiser_name, original)
        network = _network(adapter, positive).to(original.device, original.dtype)
        stack.enter_context(_evaluating(network))
        setattr(pipeline, adapter.denoiser_name, network)
    if second is not None:
        stack.enter_context(_evaluating(second))
        return _call_of(adapter, second), lambda: None
    assert negative_file is not None
    if settings.alpha:
        _require_positive(adapter, None)
    stack.enter_context(attached(pipeline, negative_file, NEGATIVE, active=False))
    fractions = [
        names
        for scale, names in ((settings.alpha, active_adapters(adapter.denoiser)), (settings.beta, [NEGATIVE]))
        if scale not in (0, 1)
    ]
    if any(uses_dora(adapter.denoiser, names) for names in fractions):
        raise ConfigError(
            "alpha and beta must be 0 or 1 for DoRA adapters, whose change of the weights does not scale with them. "
            "Write the mixture with export_negative(..., merged=True) and use that."
        )
    switch = AdapterSwitch(adapter.denoiser, settings.alpha, settings.beta)

    def call(forward: Forward, inputs: Inputs) -> Any:
        with switch.negative():
            return forward(**inputs)

    return call, switch.keep_positive


def _second_network(adapter: PipelineAdapter, negative: Model, positive: Model | None, settings: Exported) -> nn.Module:
    if settings.alpha == 0 and settings.beta == 1 and _lora_file(negative) is None:
        network = _network(adapter, negative)
        require_same(base_weights(adapter.denoiser), base_weights(network), "negative")
        return network
    return negative_network(adapter.pipeline, negative, positive, settings)


def _call_of(adapter: PipelineAdapter, network: nn.Module) -> Any:
    bare = AdapterSwitch(network, 0.0, 0.0)  # without any adapter, also such as come later

    def call(forward: Forward, inputs: Inputs) -> Any:
        if network is adapter.denoiser:  # the base is its own negative: its calls are being answered here already
            with bare.negative():
                return forward(**inputs)
        sample: Tensor = inputs["sample"] if "sample" in inputs else inputs["hidden_states"]
        if next(network.parameters()).device != sample.device:  # the pipeline was moved, or is offloaded by parts
            network.to(sample.device)
        return network(**inputs)

    return call


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """A network in evaluation mode; afterwards every module is in its own again, for it may be the user's."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _weights(adapter: PipelineAdapter, model: Model | None, name: str) -> Weights:
    """Weights of the denoiser with a model's change; None means the adapters that are active."""
    if model is None:
        return merged_weights(adapter.denoiser, active_adapters(adapter.denoiser))
    file = _lora_file(model)
    if file is None:
        return base_weights(_network(adapter, model))
    with attached(adapter.pipeline, file, name, active=False):
        return merged_weights(adapter.denoiser, [name])


def _network(adapter: PipelineAdapter, model: Model) -> Any:
    """The denoiser of a whole model, frozen; adapters that act in it are merged in a copy."""
    like = adapter.denoiser
    if isinstance(model, DiffusionPipeline):
        model = adapter_for(model).denoiser
    if isinstance(model, nn.Module):
        names = active_adapters(model)
        return network_of(model, merged_weights(model, names)) if names else model
    folder = Path(model) if (Path(model) / EXPORT_FILE).is_file() else find_weights(model)[1]
    try:
        loaded = type(like).from_pretrained(folder, subfolder=adapter.denoiser_name, dtype=like.dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot load the {adapter.denoiser_name} of {folder}: {reason}") from error
    return loaded.to(like.device).eval().requires_grad_(False)


def _lora_file(model: Model) -> Path | None:
    """The file of a LoRA; None for a whole model."""
    if isinstance(model, (nn.Module, DiffusionPipeline)) or (Path(model) / EXPORT_FILE).is_file():
        return None
    kind, found = find_weights(model)
    return found if kind == "lora" else None


def _require_positive(adapter: PipelineAdapter, positive: Model | None) -> None:
    if positive is None and not active_adapters(adapter.denoiser):
        raise ConfigError(
            "alpha mixes in a positive model, but none is given and no adapter is active. Give positive=..., load the "
            "aligned LoRA into the pipeline, or leave out alpha."
        )


def _texts(adapter: PipelineAdapter, embedding: str) -> dict[str, Tensor] | str | None:
    if embedding == "default":
        return None
    if embedding == "prompt":
        return embedding
    with torch.no_grad():
        empty = adapter.encode_prompts([""])
    return empty if embedding == "empty" else {name: torch.zeros_like(value) for name, value in empty.items()}

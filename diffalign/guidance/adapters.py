"""One copy of the base weights, another set of adapters for each branch of guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..evaluation.lora import lora_loaded
from ..pipelines import adapter_for

NEGATIVE, POSITIVE = "diffalign_negative", "diffalign_positive"


class AdapterSwitch:
    """Decides which adapters of a denoiser act.

    The positive branch has those that are active in the pipeline at that time, the negative one its own. Only which
    adapters act is changed, not what is trainable, so peft's ``set_adapter`` (which does both) is not used.

    Args:
        denoiser: carries the adapter ``NEGATIVE``.
        alpha: scale of the active adapters in the negative branch.
        beta: scale of the negative adapter there.
    """

    def __init__(self, denoiser: nn.Module, alpha: float, beta: float) -> None:
        self.denoiser, self.alpha, self.beta = denoiser, alpha, beta
        self._known: dict[str, Any] = {}
        self._layers: list[Any] = []
        for layer in self.layers():
            layer.set_scale(NEGATIVE, beta)

    def layers(self) -> list[Any]:
        """Layers with adapters; looked up again when adapters came or went."""
        present = dict(getattr(self.denoiser, "peft_config", {}))  # another adapter may come under the same name
        if present != self._known:
            self._known, self._layers = present, lora_layers(self.denoiser)
        return self._layers

    def keep_positive(self) -> None:
        """Take the negative adapter out of the active ones; peft activates it when another is deleted."""
        for layer in self.layers():
            if NEGATIVE in layer.active_adapters:
                layer._active_adapter = [name for name in layer.active_adapters if name != NEGATIVE]

    @contextmanager
    def negative(self) -> Iterator[None]:
        """The negative branch's adapters act inside the block."""
        layers = self.layers()
        before = [(layer._active_adapter, layer._disable_adapters, dict(layer.scaling)) for layer in layers]
        try:
            for layer in layers:
                active = [] if layer.disable_adapters or not self.alpha else [*layer.active_adapters]
                for name in active:
                    if name in layer.scaling:
                        layer.scaling[name] *= self.alpha
                layer._active_adapter = active + [NEGATIVE] * bool(self.beta)
                layer._disable_adapters = False
            yield
        finally:
            for layer, (active, disabled, scaling) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled
                layer.scaling.update(scaling)


@contextmanager
def attached(pipeline: DiffusionPipeline, file: Path, name: str, *, active: bool) -> Iterator[None]:
    """A LoRA under ``name`` in the pipeline's denoiser; afterwards the pipeline is what it was, scales included.

    Args:
        active: switch it on; what was active stays as it is otherwise.

    Raises:
        CheckpointError: the file does not fit, or holds parts for a text encoder, which no branch can have of its own.
        ConfigError: an adapter is fused into the weights.
    """
    denoiser = adapter_for(pipeline).denoiser
    _require_denoiser_only(file, adapter_for(pipeline).denoiser_name)
    if any(layer.merged for layer in lora_layers(denoiser)):
        raise ConfigError(
            "an adapter is fused into the pipeline's weights, so that no other can act. Call "
            "pipeline.unload_lora_weights() after pipeline.fuse_lora(), or do not fuse."
        )
    with ExitStack() as stack:
        stack.callback(_restore, _snapshot(denoiser))
        names = active_adapters(denoiser)
        disabled = any(layer.disable_adapters for layer in lora_layers(denoiser))
        inside = stack.enter_context(ExitStack())
        before = _snapshot(denoiser)
        inside.enter_context(lora_loaded(pipeline, file, name))
        _restore(before)
        for layer in lora_layers(denoiser):
            layer._active_adapter = [name] if active else list(names)
            layer._disable_adapters = disabled and not active
        yield


def lora_layers(denoiser: nn.Module) -> list[Any]:
    """Every layer that can carry a LoRA's weights."""
    return [module for module in denoiser.modules() if isinstance(module, LoraLayer)]


def active_adapters(denoiser: nn.Module) -> list[str]:
    """Names of the adapters that act now."""
    names: dict[str, None] = {}
    for layer in lora_layers(denoiser):
        if not layer.disable_adapters:
            names |= dict.fromkeys(name for name in layer.active_adapters if name in layer.lora_A)
    return list(names)


def uses_dora(denoiser: nn.Module, names: list[str]) -> bool:
    """Whether one of the adapters is a DoRA, whose change of the weights is not proportional to its scale."""
    return any(getattr(denoiser, "peft_config")[name].use_dora for name in names)  # noqa: B009 (a module's attribute)


def _require_denoiser_only(file: Path, denoiser_name: str) -> None:
    with safe_open(file, "pt") as tensors:
        parts = {key.split(".")[0] for key in tensors.keys()}  # noqa: SIM118 (a file, not a dict)
    others = sorted(part for part in parts if part.startswith("text_encoder"))
    if others:
        raise CheckpointError(
            f"{file} also changes {', '.join(others)}, but prompts are encoded once for both branches. Use a LoRA of "
            f"the {denoiser_name} alone, as the trainers here write."
        )


_State = list[tuple[Any, Any, bool, dict[str, float], list[tuple[nn.Parameter, bool]]]]


def _snapshot(denoiser: nn.Module) -> _State:
    """All that loading another adapter may disturb, by layer."""
    return [
        (
            layer,
            layer._active_adapter,
            layer._disable_adapters,
            dict(layer.scaling),
            [(parameter, parameter.requires_grad) for parameter in layer.parameters()],
        )
        for layer in lora_layers(denoiser)
    ]


def _restore(state: _State) -> None:
    for layer, active, disabled, scaling, gradients in state:
        layer._active_adapter, layer._disable_adapters = active, disabled
        layer.scaling.update({name: scale for name, scale in scaling.items() if name in layer.scaling})
        for parameter, wanted in gradients:
            parameter.requires_grad_(wanted)

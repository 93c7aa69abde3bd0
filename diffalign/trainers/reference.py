"""The reference model: the policy with its adapters off, a frozen copy, or the policy before its first update."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from .policy import DTYPES

if TYPE_CHECKING:
    from .config import TrainingConfig


class Reference(ABC):
    """Gives the module to call for reference predictions, and a hash of its weights."""

    identity: str

    @abstractmethod
    def use(self, policy: nn.Module) -> AbstractContextManager[nn.Module]:
        """Context manager that yields the module to call; gradients are the caller's matter."""

    @abstractmethod
    def release(self) -> None:
        """Give back what memory it holds; it is not used after that."""


class AdapterReference(Reference):
    """The policy's own base weights: adapters and dropout are off inside the context, and on again after it, whatever
    happens.

    Args:
        denoiser: the unwrapped policy with at least one adapter.
    """

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser
        self.identity = weights_hash(denoiser, skip="lora_")

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        self.denoiser.disable_adapters()
        try:
            with without_dropout(self.denoiser):
                yield self.denoiser
        finally:
            self.denoiser.enable_adapters()

    def release(self) -> None:
        return  # it holds none of its own


class FrozenReference(Reference):
    """A copy of the policy as it was at the start.

    Args:
        denoiser: the unwrapped policy, before its first update.
        dtype: precision of the copy; None keeps the policy's, so that both agree bit for bit at step 0.
    """

    def __init__(self, denoiser: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.module = copy.deepcopy(denoiser).requires_grad_(False).eval()
        self.identity = weights_hash(self.module)
        if dtype is not None:
            self.module.to(dtype)

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.module

    def release(self) -> None:
        del self.module


class InitialReference(Reference):
    """The policy itself, good for as long as it has not been updated: for errors that are found beforehand.

    Args:
        denoiser: the unwrapped policy, before its first update.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser: nn.Module | None = denoiser
        self.identity = weights_hash(denoiser)

    @contextmanager
    def use(self, policy: nn.Module) -> Iterator[nn.Module]:
        if self.denoiser is None:
            raise CheckpointError(
                "the weights at the start are needed again, but the policy has moved on: something that was computed "
                "with them beforehand is gone from the cache. Delete reference-errors.safetensors in output_dir to "
                "compute all of it anew."
            )
        with without_dropout(self.denoiser):
            yield self.denoiser

    def release(self) -> None:
        self.denoiser = None


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[nn.Module]:
    """A network in eval mode, and afterwards as it was: what is compared with, or inverted by, must not be random."""
    was_training = module.training
    module.eval()
    try:
        yield module
    finally:
        module.train(was_training)


def build_reference(denoiser: nn.Module, config: TrainingConfig, *, temporary: bool = False) -> Reference:
    """The reference that a run's settings ask for, from the policy before its first update."""
    if config.adapter != "none":
        return AdapterReference(denoiser)
    if temporary:
        return InitialReference(denoiser)
    return FrozenReference(denoiser, None if config.reference_dtype == "same" else DTYPES[config.reference_dtype])


def weights_hash(module: nn.Module, *, skip: str | None = None) -> str:
    """Hash of a module's parameters: order, base names, dtypes, shapes and bytes.

    Args:
        module: any module.
        skip: leave out parameters whose name contains this, for example ``lora_``.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if skip is not None and skip in name:
            continue
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

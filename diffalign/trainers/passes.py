"""Forward and backward passes: from noisy images to a matrix of errors, and from an objective to gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..objectives import LossOutput, error_gradients
from .batches import Batch, Images
from .policy import DTYPES

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..diffusion import Schedule
    from ..pipelines import PipelineAdapter
    from .config import PreferenceConfig


class Passes:
    """Runs policy and reference alike.

    Args:
        adapter: how the family's denoiser is called.
        schedule: noising, and what the output means.
        config: `mixed_precision`, `loss_space` and `images_per_pass` are read.
        accelerator: autocast, backward, and the exchange of gradients.
    """

    def __init__(
        self, adapter: PipelineAdapter, schedule: Schedule, config: PreferenceConfig, accelerator: Accelerator
    ) -> None:
        self.adapter, self.schedule, self.accelerator = adapter, schedule, accelerator
        self.dtype = DTYPES[config.mixed_precision]
        self.loss_space, self.limit = config.loss_space, config.images_per_pass

    def predict(self, model: nn.Module, noisy: Tensor, images: Images, time: Tensor | None = None) -> Tensor:
        """Output of a network (N, C, h, w) for noisy latents, told the time of their timesteps (or another one)."""
        if time is None:
            time = self.schedule.time(images.timesteps)
        if self.limit is not None and len(images) > self.limit:
            chunks = zip(noisy.split(self.limit), images.split(self.limit), time.split(self.limit), strict=True)
            return torch.cat([self.predict(model, *chunk) for chunk in chunks])
        with self.accelerator.autocast():
            return self.adapter.predict(model, noisy, time, images.conditioning, images.size_ids, dtype=self.dtype)

    def errors(self, model: nn.Module, images: Images) -> Tensor:
        """Denoising error of N images, (N,) fp32, mean over C, h, w."""
        noisy = self.schedule.add_noise(images.latents, images.noise, images.timesteps)
        return self.schedule.denoising_error(
            self.predict(model, noisy, images), images.latents, images.noise, images.timesteps, self.loss_space
        )

    def backward(
        self,
        model: nn.Module,
        batch: Batch,
        objective: Callable[[Tensor], LossOutput],
        *,
        scale: float,
        sync: bool,
    ) -> tuple[LossOutput, Tensor]:
        """Evaluate an objective on the policy's errors and add its gradients to the weights'.

        The objective depends on the weights through the matrix of errors alone. So with ``images_per_pass`` the errors
        are first found without gradients, a few images at a time, and each image's error is then propagated with the
        objective's derivative as its weight: the same gradient from one more forward pass, in the memory of the part.

        Args:
            model: the policy, maybe wrapped for several processes.
            batch: B rows of k images.
            objective: of errors (B, k).
            scale: factor of the summed loss.
            sync: whether processes exchange gradients after it.

        Returns:
            The objective's output, and the errors (B, k), detached.
        """
        images = batch.images()
        if self.limit is None or len(images) <= self.limit:
            with self._exchange(model, sync):
                error = self.errors(model, images).view(batch.shape)
                out = objective(error)
                self.accelerator.backward(out.loss.sum() * scale)
            return out, error.detach()
        with torch.no_grad():
            error = self.errors(model, images).view(batch.shape)
        out, weights = error_gradients(objective, error)
        parts = list(zip(images.split(self.limit), weights.flatten().split(self.limit), strict=True))
        for number, (part, weight) in enumerate(parts, 1):
            with self._exchange(model, sync and number == len(parts)):
                self.accelerator.backward((weight * self.errors(model, part)).sum() * scale)
        return out, error

    def _exchange(self, model: nn.Module, sync: bool) -> AbstractContextManager[None]:
        return nullcontext() if sync else self.accelerator.no_sync(model)

"""A forward process x_t = a_t x0 + b_t eps: what all families of models share.

Nothing here is ever computed in half precision: whatever comes in is cast to fp32 first.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..errors import ConfigError
from .conversions import implied_clean, implied_noise

LOSS_SPACES = ("default", "native", "epsilon", "x0")


class Schedule(ABC):
    """A forward process and what the network's output means.

    Timesteps are integers 0..T-1 for every family; only :meth:`time` knows what a network is told instead.

    Args:
        signal: (T,) fp64 a_t, falling.
        noise: (T,) fp64 b_t. Both are rounded to fp32 once: one found from the other's fp32 would lose digits.
        prediction_type: what the network returns: ``epsilon``, ``v_prediction``, ``sample`` (x0) or ``flow``.
    """

    def __init__(self, signal: Tensor, noise: Tensor, prediction_type: str) -> None:
        self.prediction_type = prediction_type
        self._exact = signal, noise
        self._a, self._b = signal.to(torch.float32), noise.to(torch.float32)

    @abstractmethod
    def time(self, t: Tensor) -> Tensor:
        """What the network is told in place of timesteps (N,)."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have returned, in its own space; shapes as in :meth:`add_noise`, fp32."""

    @abstractmethod
    def _weight(self, t: Tensor, space: str) -> Tensor:
        """(N,) fp32 factor that carries a native squared error into a known space."""

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self._a)

    def levels(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """How much signal and noise there is from the clean picture on, for walks between timesteps.

        Returns:
            a and b with x = a x0 + b eps, each (T + 1,) in ``dtype`` on the CPU, rounded from fp64. Entry 0 is the
            clean picture (1, 0), which no timestep is; entry t + 1 is timestep t.
        """
        a, b = self._exact
        return torch.cat([a.new_ones(1), a]).to(dtype), torch.cat([b.new_zeros(1), b]).to(dtype)

    @property
    def identity(self) -> str:
        """Hash of the noise levels, in the fp32 that is used, and of what the network returns."""
        digest = hashlib.blake2b(self.prediction_type.encode(), digest_size=8)
        digest.update(torch.stack(self.levels()).numpy().tobytes())
        return digest.hexdigest()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = a_t x0 + b_t eps.

        Args:
            x0: (N, C, h, w) clean scaled latents.
            noise: same shape, unit variance.
            t: (N,) int64 timesteps in [0, T).

        Returns:
            (N, C, h, w) fp32.
        """
        a, b = self._coefficients(t, x0)
        return a * x0.float() + b * noise.float()

    def denoising_error(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, space: str = "default"
    ) -> Tensor:
        """Squared error of each item, averaged over C, h, w.

        Args:
            prediction: (N, C, h, w) output of the network, any float dtype; cast to fp32 before the subtraction.
            x0, noise, t: as in :meth:`add_noise`.
            space: ``native`` is the network's own. ``default`` is that in which published values of beta are meant:
                epsilon, and the velocity's own for flow models.

        Returns:
            (N,) fp32, differentiable with respect to ``prediction``.

        Raises:
            ConfigError: an unknown space.
        """
        error = (self.target(x0, noise, t) - prediction.float()).square().flatten(1).mean(1)
        return error * self.error_weight(t, space)

    def error_weight(self, t: Tensor, space: str = "default") -> Tensor:
        """(N,) fp32 factor that carries a native squared error into ``space``; the families state their formulas."""
        if space not in LOSS_SPACES:
            raise ConfigError(f"loss_space must be one of {', '.join(LOSS_SPACES)}; got {space!r}.")
        return self._weight(t, space)

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output implies; (N, C, h, w) fp32."""
        return implied_noise(self.prediction_type, prediction.float(), x_t.float(), *self._coefficients(t, x_t))

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the network's output implies; (N, C, h, w) fp32.

        An epsilon model where no signal is left implies none; the answer there is 0, the mean of latents.
        """
        return implied_clean(self.prediction_type, prediction.float(), x_t.float(), *self._coefficients(t, x_t))

    def snr(self, t: Tensor) -> Tensor:
        """(N,) fp32 signal-to-noise ratio (a_t / b_t)^2."""
        return (self._at(self._a, t) / self._at(self._b, t)).square()

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, shaped to multiply ``like``."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self._at(self._a, t).view(shape), self._at(self._b, t).view(shape)

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[t]

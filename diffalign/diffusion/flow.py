"""The straight path of flow-matching models (SD3, FLUX): add noise, state the velocity, measure the error.

Notation (name here -> symbol in the papers)
    sigma(t) = (t + 1) / T    -> the time of the path, in (0, 1]; 1 is pure noise
    x_t = (1 - sigma) x0 + sigma eps,  u = eps - x0     (Liu et al. 2022, 2209.03003; Esser et al. 2024, 2403.03206)

The same mistake of a model measures differently in each space (all squared, mean over C, H, W):
    eps-error = (1 - sigma)^2 * u-error,   x0-error = sigma^2 * u-error.

A scheduler's ``shift`` moves no timestep here: t always means (t + 1) / T. It changes how often each t is drawn, see
:func:`diffalign.diffusion.draw_timestep`. Nothing here is ever computed in half precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .conversions import implied_clean, implied_noise
from .schedule import LOSS_SPACES

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


class FlowSchedule:
    """Rectified flow with the surface of :class:`NoiseSchedule`.

    Args:
        num_timesteps: T, into how many steps the path is cut.

    Raises:
        ConfigError: fewer than one timestep.
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        if num_timesteps < 1:
            raise ConfigError(f"num_timesteps must be at least 1; got {num_timesteps}.")
        self.prediction_type = "flow"
        self._sigma = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        # 1 - sigma is rounded from fp64 once: subtracting in fp32 would lose digits near pure noise.
        self._a, self._b = (1 - self._sigma).to(torch.float32), self._sigma.to(torch.float32)

    @classmethod
    def from_scheduler(cls, scheduler_config: Mapping[str, Any]) -> FlowSchedule:
        """The schedule that a FlowMatchEulerDiscreteScheduler's configuration describes.

        Its ``shift`` and its other ways to space the sampling steps are of no concern to the forward process.

        Raises:
            ConfigError: another scheduler, or one whose time runs backwards (``invert_sigmas``).
        """
        name = scheduler_config.get("_class_name", "")
        known = not name or name in FLOW_SCHEDULERS
        if not known or "beta_schedule" in scheduler_config or "use_dynamic_shifting" not in scheduler_config:
            raise ConfigError(
                f"the scheduler {name or 'of this configuration'} is no {FLOW_SCHEDULERS[0]}, the one that describes "
                "flow-matching models here. Give the pipeline that scheduler, with its shift; the model stays the same."
            )
        if scheduler_config.get("invert_sigmas"):
            raise ConfigError(
                "invert_sigmas means that time runs from noise to picture; such models are not supported."
            )
        return cls(int(scheduler_config.get("num_train_timesteps", 1000)))

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self._sigma)

    def sigma(self, t: Tensor) -> Tensor:
        """(N,) fp32 share of noise, (t + 1) / T."""
        return self._at(self._b, t)

    def time(self, t: Tensor) -> Tensor:
        """What the network is told: sigma T = t + 1, in fp32."""
        return (t + 1).to(torch.float32)

    def levels(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Signal 1 - sigma and noise sigma from the clean picture on; see :meth:`NoiseSchedule.levels`."""
        sigma = torch.cat([torch.zeros(1, dtype=torch.float64), self._sigma])
        return (1 - sigma).to(dtype), sigma.to(dtype)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = (1 - sigma) x0 + sigma eps.

        Args:
            x0: (N, C, h, w) clean scaled latents.
            noise: same shape, unit variance.
            t: (N,) int64 timesteps in [0, T).

        Returns:
            (N, C, h, w) fp32.
        """
        a, b = self._coefficients(t, x0)
        return a * x0.float() + b * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity eps - x0, which is the same at every t; (N, C, h, w) fp32."""
        return noise.float() - x0.float()

    def denoising_error(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, space: str = "default"
    ) -> Tensor:
        """Squared error of each item, averaged over C, h, w.

        Args:
            prediction: (N, C, h, w) output of the network, any float dtype; cast to fp32 before the subtraction.
            x0, noise, t: as in :meth:`add_noise`.
            space: ``default`` and ``native`` are the velocity's own, the space in which flow models are trained and in
                which SD3's published values of beta are meant. At t = T - 1 the error is worth 0 in epsilon space.

        Returns:
            (N,) fp32, differentiable with respect to ``prediction``.

        Raises:
            ConfigError: an unknown space.
        """
        error = (self.target(x0, noise, t) - prediction.float()).square().flatten(1).mean(1)
        return error * self.error_weight(t, space)

    def error_weight(self, t: Tensor, space: str = "default") -> Tensor:
        """(N,) fp32 factor that carries a velocity's squared error into ``space`` (see the top of this file)."""
        if space not in LOSS_SPACES:
            raise ConfigError(f"loss_space must be one of {', '.join(LOSS_SPACES)}; got {space!r}.")
        if space == "epsilon":
            return self._at(self._a, t).square()
        if space == "x0":
            return self._at(self._b, t).square()
        return torch.ones_like(self._at(self._b, t))

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output implies; (N, C, h, w) fp32."""
        a, b = self._coefficients(t, x_t)
        return implied_noise("flow", prediction.float(), x_t.float(), a, b)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the network's output implies; (N, C, h, w) fp32."""
        a, b = self._coefficients(t, x_t)
        return implied_clean("flow", prediction.float(), x_t.float(), a, b)

    def snr(self, t: Tensor) -> Tensor:
        """(N,) fp32 signal-to-noise ratio ((1 - sigma) / sigma)^2."""
        return (self._at(self._a, t) / self._at(self._b, t)).square()

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """1 - sigma and sigma, shaped to multiply ``like``."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self._at(self._a, t).view(shape), self._at(self._b, t).view(shape)

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[t]

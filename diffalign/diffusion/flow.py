"""The straight path of flow-matching models (SD3, FLUX): add noise, state the velocity, measure the error.

Notation (name here -> symbol in the papers)
    sigma(t) = (t + 1) / T    -> the time of the path, in (0, 1]; 1 is pure noise
    x_t = (1 - sigma) x0 + sigma eps,  u = eps - x0     (Liu et al. 2022, 2209.03003; Esser et al. 2024, 2403.03206)

The same mistake of a model measures differently in each space (all squared, mean over C, H, W):
    eps-error = (1 - sigma)^2 * u-error,   x0-error = sigma^2 * u-error.

A scheduler's ``shift`` moves no timestep here: t always means (t + 1) / T. It changes how often each t is drawn, see
:func:`diffalign.diffusion.draw_timestep`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Schedule

FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler",)


class FlowSchedule(Schedule):
    """Rectified flow: a = 1 - sigma, b = sigma.

    Args:
        num_timesteps: T, into how many steps the path is cut.

    Raises:
        ConfigError: fewer than one timestep.
    """

    def __init__(self, num_timesteps: int = 1000) -> None:
        if num_timesteps < 1:
            raise ConfigError(f"num_timesteps must be at least 1; got {num_timesteps}.")
        sigma = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
        super().__init__(1 - sigma, sigma, "flow")

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

    def sigma(self, t: Tensor) -> Tensor:
        """(N,) fp32 share of noise, (t + 1) / T."""
        return self._at(self._b, t)

    def time(self, t: Tensor) -> Tensor:
        """sigma T = t + 1, in fp32."""
        return (t + 1).to(torch.float32)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity eps - x0, which is the same at every t; (N, C, h, w) fp32."""
        return noise.float() - x0.float()

    def _weight(self, t: Tensor, space: str) -> Tensor:
        """See the top of this file; ``default`` and ``native`` are the velocity's own, in which SD3's beta is meant.

        At t = T - 1 the error is worth 0 in epsilon space.
        """
        if space == "epsilon":
            return self._at(self._a, t).square()
        if space == "x0":
            return self._at(self._b, t).square()
        return torch.ones_like(self._at(self._b, t))

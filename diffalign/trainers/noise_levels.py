"""At which noise levels a run trains: one reading of the settings for all that learn from denoising errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..diffusion import Schedule, draw_timestep
from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import NoiseLevelConfig


class TimestepSampler:
    """Draws timesteps by the settings of a run.

    Args:
        schedule: gives the range, and the density where the settings leave it open.
        config: ``min_timestep``, ``max_timestep``, ``timesteps``, ``timestep_density`` and its two numbers are read.

    Raises:
        ConfigError: numbers of a logit-normal density for a model whose timesteps are drawn uniformly, or a shift for
            one that has none.
    """

    def __init__(self, schedule: Schedule, config: NoiseLevelConfig) -> None:
        self.schedule, self.config = schedule, config
        own = "logit_normal" if schedule.prediction_type == "flow" else "uniform"
        self.density = own if config.timestep_density == "default" else config.timestep_density
        if self.density == "uniform" and (config.density_mean, config.density_std) != (0.0, 1.0):
            raise ConfigError(
                "density_mean and density_std have no effect: this model's timesteps are drawn uniformly. Set "
                "timestep_density=logit_normal, or leave them out."
            )
        if self.density == "shift" and schedule.prediction_type != "flow":
            raise ConfigError(
                "timestep_density=shift follows the shift of a flow model's scheduler, and this model has none: leave "
                "it out."
            )

    def draw(self, generator: torch.Generator, *, shift: float, stratum: tuple[int, int] = (0, 1)) -> int:
        """One timestep.

        Args:
            generator: keyed by what the timestep is for.
            shift: of the family's scheduler at this size of latents.
            stratum: see :func:`diffalign.diffusion.draw_timestep`.

        Raises:
            ConfigError: no timestep is allowed.
        """
        config = self.config
        return draw_timestep(
            self.schedule,
            min_timestep=config.min_timestep,
            max_timestep=config.max_timestep,
            timesteps=config.timesteps,
            generator=generator,
            density=self.density,
            mean=config.density_mean,
            std=config.density_std,
            shift=shift,
            stratum=stratum,
        )

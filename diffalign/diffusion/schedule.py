"""Variance-preserving noise schedules: add noise, state the target, measure the error, convert between spaces.

Notation (name here -> symbol in the papers)
    alphas_cumprod[t]   -> A_t, the signal power left at timestep t, in [0, 1)
    sqrt(A_t)           -> a_t
    sqrt(1 - A_t)       -> b_t
    x_t = a_t x0 + b_t eps,  v = a_t eps - b_t x0     (Ho et al. 2020, 2006.11239; Salimans & Ho 2022, 2202.00512)

The same mistake of a model measures differently in each space (all squared, mean over C, H, W):
    eps-error = A_t * v-error,   x0-error = (1 - A_t) * v-error,   eps-error = A_t / (1 - A_t) * x0-error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Schedule

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class NoiseSchedule(Schedule):
    """The forward process a model was trained with, and what its output means.

    Args:
        alphas_cumprod: (T,) signal power per timestep, in [0, 1), falling.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample`` (x0): what the network returns.

    Raises:
        ConfigError: an unknown prediction type, or a schedule that does not fall within [0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        if prediction_type not in PREDICTION_TYPES:
            raise ConfigError(
                f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}; the scheduler says "
                f"{prediction_type!r}. Correct the pipeline's scheduler_config.json."
            )
        power = alphas_cumprod.to(torch.float64)
        if (
            power.ndim != 1
            or len(power) < 1
            or not bool(((power >= 0) & (power < 1)).all() and (power.diff() < 0).all())
        ):
            raise ConfigError(
                "alphas_cumprod must be a list of numbers in [0, 1) that fall from one timestep to the next."
            )
        self.alphas_cumprod = power.to(torch.float32)
        super().__init__(power.sqrt(), (1 - power).sqrt(), prediction_type)

    @classmethod
    def from_scheduler(cls, scheduler_config: Mapping[str, Any], *, zero_terminal_snr: bool = False) -> NoiseSchedule:
        """The schedule that a diffusers scheduler's configuration describes.

        Args:
            scheduler_config: ``pipeline.scheduler.config``.
            zero_terminal_snr: shift and scale sqrt(A_t) so that the last timestep is pure noise (Lin et al. 2023,
                2305.08891, Algorithm 1); also done when the configuration says ``rescale_betas_zero_snr``.

        Raises:
            ConfigError: a flow-matching scheduler or an unknown ``beta_schedule``.
        """
        betas = _betas(scheduler_config)
        power = torch.cumprod(1 - betas, dim=0)
        if zero_terminal_snr or scheduler_config.get("rescale_betas_zero_snr"):
            a = power.sqrt()
            power = ((a - a[-1]) * a[0] / (a[0] - a[-1])).square()
        return cls(power, scheduler_config.get("prediction_type", "epsilon"))

    def time(self, t: Tensor) -> Tensor:
        """The timestep itself."""
        return t

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return x0.float()
        a, b = self._coefficients(t, x0)
        return a * noise.float() - b * x0.float()

    def _weight(self, t: Tensor, space: str) -> Tensor:
        """See the top of this file; ``default`` is epsilon.

        Where A_t = 0 (zero terminal SNR) x_t holds nothing of x0: a v-model's error is worth 0 in epsilon space, and an
        epsilon model's is worth 0 in x0 space, where the formula would divide by A_t.
        """
        wanted = {"default": "epsilon", "native": self.prediction_type, "x0": "sample"}.get(space, space)
        a2, b2 = self._at(self._a, t).square(), self._at(self._b, t).square()
        if wanted == self.prediction_type:
            return torch.ones_like(a2)
        if self.prediction_type == "v_prediction":
            return a2 if wanted == "epsilon" else b2
        if wanted == "epsilon":
            return a2 / b2
        return torch.where(a2 > 0, b2 / a2.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


def _betas(config: Mapping[str, Any]) -> Tensor:
    """(T,) fp64 step variances of a diffusers scheduler configuration."""
    if config.get("trained_betas") is not None:
        return torch.tensor([float(beta) for beta in config["trained_betas"]], dtype=torch.float64)
    if "beta_schedule" not in config:
        raise ConfigError(
            f"the scheduler {config.get('_class_name', '')} has no beta_schedule, so it is no variance-preserving "
            "process (a flow-matching model?). Supported: models that predict epsilon, v or x0 on such a schedule."
        )
    kind, count = config["beta_schedule"], int(config["num_train_timesteps"])
    if kind == "squaredcos_cap_v2":
        return _cosine_betas(count)
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if kind == "scaled_linear":  # the schedule of all latent diffusion models
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    raise ConfigError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}; the scheduler says {kind!r}.")


def _cosine_betas(count: int, largest: float = 0.999) -> Tensor:
    """Betas of the cosine schedule (Nichol & Dhariwal 2021, 2102.09672, Eq. 17), cut at ``largest``."""

    def power(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - power((i + 1) / count) / power(i / count), largest) for i in range(count)]
    return torch.tensor(betas, dtype=torch.float64)

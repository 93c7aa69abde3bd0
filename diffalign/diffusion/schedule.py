"""Variance-preserving noise schedules: add noise, state the target, measure the error, convert between spaces.

Notation (name here -> symbol in the papers)
    alphas_cumprod[t]   -> A_t, the signal power left at timestep t, in [0, 1)
    sqrt(A_t)           -> a_t
    sqrt(1 - A_t)       -> b_t
    x_t = a_t x0 + b_t eps,  v = a_t eps - b_t x0     (Ho et al. 2020, 2006.11239; Salimans & Ho 2022, 2202.00512)

The same mistake of a model measures differently in each space (all squared, mean over C, H, W):
    eps-error = A_t * v-error,   x0-error = (1 - A_t) * v-error,   eps-error = A_t / (1 - A_t) * x0-error.

Nothing here is ever computed in half precision: whatever comes in is cast to fp32 first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .conversions import implied_clean, implied_noise

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
LOSS_SPACES = ("default", "native", "epsilon", "x0")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


class NoiseSchedule:
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
        self.prediction_type = prediction_type
        self._power = power
        self.alphas_cumprod = power.to(torch.float32)
        # a_t and b_t are rounded from fp64 once: b_t = sqrt(1 - fp32(A_t)) would lose digits at small t.
        self._a, self._b = power.sqrt().to(torch.float32), (1 - power).sqrt().to(torch.float32)

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

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def time(self, t: Tensor) -> Tensor:
        """What the network is told: the timestep itself."""
        return t

    def levels(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """How much signal and noise there is from the clean picture on, for walks between timesteps.

        Returns:
            a and b with x = a x0 + b eps, each (T + 1,) in ``dtype`` on the CPU, rounded from fp64. Entry 0 is the
            clean picture (1, 0), which no timestep is; entry t + 1 is timestep t.
        """
        power = torch.cat([torch.ones(1, dtype=torch.float64), self._power])
        return power.sqrt().to(dtype), (1 - power).sqrt().to(dtype)

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

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should have returned, in its own space; shapes as in :meth:`add_noise`, fp32."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return x0.float()
        a, b = self._coefficients(t, x0)
        return a * noise.float() - b * x0.float()

    def denoising_error(
        self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor, space: str = "default"
    ) -> Tensor:
        """Squared error of each item, averaged over C, h, w.

        Args:
            prediction: (N, C, h, w) output of the network, any float dtype; cast to fp32 before the subtraction.
            x0, noise, t: as in :meth:`add_noise`.
            space: ``default`` is epsilon, in which published values of beta are meant; ``native`` is the network's own.
                Where A_t = 0 (zero terminal SNR) x_t holds nothing of x0: a v-model's error is worth 0 in epsilon
                space, and an epsilon model's is worth 0 in x0 space, where the formula would divide by A_t.

        Returns:
            (N,) fp32, differentiable with respect to ``prediction``.

        Raises:
            ConfigError: an unknown space.
        """
        error = (self.target(x0, noise, t) - prediction.float()).square().flatten(1).mean(1)
        return error * self.error_weight(t, space)

    def error_weight(self, t: Tensor, space: str = "default") -> Tensor:
        """(N,) fp32 factor that carries a native squared error into ``space`` (see the top of this file)."""
        if space not in LOSS_SPACES:
            raise ConfigError(f"loss_space must be one of {', '.join(LOSS_SPACES)}; got {space!r}.")
        wanted = {"default": "epsilon", "native": self.prediction_type, "x0": "sample"}.get(space, space)
        a2, b2 = self._at(self._a, t).square(), self._at(self._b, t).square()
        if wanted == self.prediction_type:
            return torch.ones_like(a2)
        if self.prediction_type == "v_prediction":
            return a2 if wanted == "epsilon" else b2
        if wanted == "epsilon":
            return a2 / b2
        return torch.where(a2 > 0, b2 / a2.clamp_min(torch.finfo(torch.float32).tiny), 0.0)

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that the network's output implies; (N, C, h, w) fp32."""
        a, b = self._coefficients(t, x_t)
        return implied_noise(self.prediction_type, prediction.float(), x_t.float(), a, b)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that the network's output implies; (N, C, h, w) fp32.

        An epsilon model at A_t = 0 implies none; the answer there is 0, the mean of latents.
        """
        a, b = self._coefficients(t, x_t)
        return implied_clean(self.prediction_type, prediction.float(), x_t.float(), a, b)

    def snr(self, t: Tensor) -> Tensor:
        """(N,) fp32 signal-to-noise ratio A_t / (1 - A_t)."""
        return (self._at(self._a, t) / self._at(self._b, t)).square()

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a_t and b_t, shaped to multiply ``like``."""
        shape = (-1, *[1] * (like.ndim - 1))
        return self._at(self._a, t).view(shape), self._at(self._b, t).view(shape)

    @staticmethod
    def _at(table: Tensor, t: Tensor) -> Tensor:
        return table.to(t.device)[t]


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

"""Sampling as a chain of Gaussian draws with exact densities, for policy gradients.

Every sampler here goes from one noise level to the next through a normal distribution whose mean is linear in the
state and in the network's output:

    x' ~ N(mu, tau^2 I),    mu = k_x x + k_p prediction.

The three numbers of a step are worked out in fp64 once, from the noise levels of both ends, and the transition itself
runs in fp32 whatever the network runs in. Rollout and training use the same :class:`Transition`, so that the density
of a stored transition is the same number both times.

Notation (name here -> symbol): signal, noise of a level -> a, b with x = a x0 + b eps; the next level's -> a', b';
noise_level -> eta or a of the papers; std -> tau; flow models: sigma = b, dt = sigma' - sigma < 0.

    ddim       tau^2 = eta^2 (b'/b)^2 (1 - (a/a')^2),   mu = a' x0 + sqrt(b'^2 - tau^2) eps
               (Song et al. 2020, 2010.02502, Eq. 12 and 16; eta = 1 is the posterior of DDPM)
    cps        tau = b' sin(eta pi/2), mu as for ddim: signal and total noise of the level are kept exactly
               (Wang & Yu 2025, 2509.05952)
    flow_sde   s = eta sqrt(sigma / (1 - sigma)), tau = s sqrt(-dt),
               mu = x + (v + s^2/(2 sigma) (x + (1 - sigma) v)) dt        (Liu et al. 2025, 2505.05470, Eq. 9)
    dance_sde  the same with s = eta                                      (Xue et al. 2025, 2505.07818)

The two SDEs leave more noise in x' than the level has (for sigma 0.8 -> 0.7 at eta = 0.7 a variance of 0.53 in place
of 0.49): the grain that users see. ddim and cps do not.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ..errors import ConfigError
from .base import Schedule
from .conversions import implied_clean, implied_noise

#: Samplers by the kind of model, the default first, and the noise level that each is usually run with.
SAMPLERS = {"variance_preserving": ("ddim", "cps"), "flow": ("flow_sde", "dance_sde", "cps")}
NOISE_LEVELS = {"ddim": 1.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
CONVENTIONS = ("mean", "sum")


@dataclass(frozen=True)
class SamplingGrid:
    """The noise levels that a sampler visits, from pure noise to the picture.

    Args:
        prediction_type: what the network returns, as in :mod:`diffalign.diffusion.conversions`.
        signal, noise: (S + 1,) fp64 on the CPU, a and b of each level.
        times: (S,) fp32, what the network is told at each level but the last.
    """

    prediction_type: str
    signal: Tensor
    noise: Tensor
    times: Tensor

    def __len__(self) -> int:
        """S, the number of steps."""
        return len(self.times)

    @property
    def kind(self) -> str:
        """``flow`` or ``variance_preserving``."""
        return "flow" if self.prediction_type == "flow" else "variance_preserving"


@dataclass(frozen=True)
class Transition:
    """One step of a sampler.

    Args:
        index: place in the grid, 0 is the first step from pure noise.
        time: what the network is told.
        x_scale, prediction_scale: k_x and k_p.
        std: tau; 0 for a deterministic step, which has no density.
        width: what a step's own size contributes to a change of mu: -dt for flow models, |k_p| for others.
    """

    index: int
    time: float
    x_scale: float
    prediction_scale: float
    std: float
    width: float

    def mean(self, x: Tensor, prediction: Tensor) -> Tensor:
        """mu, (N, C, h, w) fp32, differentiable in the prediction."""
        return self.x_scale * x.float() + self.prediction_scale * prediction.float()

    def draw(self, mean: Tensor, noise: Tensor | None) -> Tensor:
        """x' = mu + tau z; a deterministic step needs no noise."""
        if self.std == 0:
            return mean
        if noise is None:
            raise ValueError(f"step {self.index} is stochastic (std {self.std}) and needs noise.")
        return mean + self.std * noise.float()

    def log_density(self, x_next: Tensor, mean: Tensor, convention: str = "mean") -> Tensor:
        """See :func:`log_density`."""
        return log_density(x_next, mean, self.std, convention)


def log_density(x_next: Tensor, mean: Tensor, std: float, convention: str = "mean") -> Tensor:
    """Log-density of a step's result under N(mean, std^2 I).

    Args:
        x_next: (N, ...) where the step ended.
        mean: same shape, where it was expected to.
        std: of the step.
        convention: ``sum`` is the log-density. ``mean`` is that divided by the number D of elements, as all published
            clip ranges mean it: the "ratio" is then the D-th root of the true one, and a clip range of 1e-4 stands for
            1.6 nats at D = 16 384 (SD1.5, 512 px), 6.6 at 65 536 (SDXL, 1024 px; SD3, 512 px), 26 at 262 144 (FLUX).

    Returns:
        (N,) fp64: elements are fp32, their sum is not, or ratios of large latents would be rounding noise.

    Raises:
        ValueError: std is not above 0 (a deterministic step has no density), or an unknown convention.
    """
    if not std > 0:
        raise ValueError(f"a step with std {std} is deterministic and has no log-density; leave it out of the loss.")
    square = ((x_next.float() - mean.float()) / std).square()
    return _reduce(-0.5 * square - (math.log(std) + 0.5 * math.log(2 * math.pi)), convention)


def drift(mean: Tensor, old_mean: Tensor, std: float, convention: str = "mean") -> Tensor:
    """(N,) fp64: (mu - mu_old)^2 / (2 tau^2), the bias of the log-ratio and the KL divergence of two steps alike.

    Under the old policy the log-ratio is on average minus this number. Over the reference's mean it is the exact KL
    divergence per element (``mean``) or in all (``sum``).
    """
    return _reduce((mean.float() - old_mean.float()).square() / (2 * std**2), convention)


def _reduce(values: Tensor, convention: str) -> Tensor:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}.")
    total = values.flatten(1).sum(1, dtype=torch.float64)
    return total / values[0].numel() if convention == "mean" else total


# --- grids ---------------------------------------------------------------------------------------------------------


def noise_grid(schedule: Schedule, scheduler_config: Mapping[str, Any], steps: int) -> SamplingGrid:
    """The levels at which a variance-preserving model is sampled in ``steps`` steps.

    Timesteps are those that the pipeline's scheduler is configured for (spacing and offset), each step ends at the next
    entry of the list, and the last one at the schedule's first level, or at the clean picture where the configuration
    says ``set_alpha_to_one``. With leading spacing that is diffusers' own pairing. With trailing or linspace spacing
    diffusers' DDIM takes t - T // steps as the end of a step instead, which may differ by one timestep from the list.

    Raises:
        ConfigError: more steps than timesteps.
    """
    if not 1 <= steps <= schedule.num_timesteps:
        raise ConfigError(f"sampling steps must lie in 1..{schedule.num_timesteps}; got {steps}.")
    clean = bool(scheduler_config.get("set_alpha_to_one", False))
    scheduler: Any = DDIMScheduler.from_config(dict(scheduler_config), clip_sample=False, thresholding=False)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.to(torch.int64)
    signal, noise = schedule.levels(torch.float64)  # entry t + 1 is timestep t, entry 0 the clean picture
    levels = torch.cat([timesteps + 1, torch.tensor([0 if clean else 1])])
    return SamplingGrid(schedule.prediction_type, signal[levels], noise[levels], schedule.time(timesteps).float())


def flow_grid(sigmas: Sequence[float] | Tensor, num_train_timesteps: int = 1000) -> SamplingGrid:
    """The levels of a flow model.

    Args:
        sigmas: S + 1 falling noise levels; the last is 0.
        num_train_timesteps: the network is told sigma times this.

    Raises:
        ConfigError: levels that do not fall from at most 1 to 0.
    """
    sigma = torch.as_tensor(sigmas, dtype=torch.float64)
    if len(sigma) < 2 or sigma[0] > 1 or sigma[-1] != 0 or bool((sigma.diff() >= 0).any()):
        raise ConfigError(f"sigmas must fall from at most 1 to 0; got {sigma.tolist()}.")
    times = (sigma[:-1] * num_train_timesteps).float()
    return SamplingGrid("flow", 1 - sigma, sigma, times)


# --- transitions ---------------------------------------------------------------------------------------------------


def transitions(
    grid: SamplingGrid, sampler: str, noise_level: float | None = None, *, stochastic: Collection[int] | None = None
) -> list[Transition]:
    """The steps of a sampler over a grid.

    Args:
        grid: noise levels.
        sampler: ``ddim`` or ``cps`` for variance-preserving models; ``flow_sde``, ``dance_sde`` or ``cps`` for flow.
        noise_level: eta; None takes the usual one (:data:`NOISE_LEVELS`). 0 makes every step deterministic.
        stochastic: indices of the steps that inject noise; None means all. The others are deterministic: DDIM with
            eta = 0, which for a flow model is its Euler step.

    Raises:
        ConfigError: a sampler of the other kind of model, a noise level out of range, or a stochastic step whose end
            has no noise left to replace (the last one of cps).
    """
    known = SAMPLERS[grid.kind]
    if sampler not in known:
        raise ConfigError(f"sampler must be one of {', '.join(known)} for a {grid.kind} model; got {sampler!r}.")
    level = NOISE_LEVELS[sampler] if noise_level is None else noise_level
    highest = math.inf if sampler.endswith("_sde") else 1.0
    if not 0 <= level <= highest:
        raise ConfigError(f"noise_level of {sampler} must lie in 0..{highest}; got {level}.")
    noisy = range(len(grid)) if stochastic is None else stochastic
    steps = [_step(grid, i, sampler, level if i in noisy else 0.0) for i in range(len(grid))]
    if stochastic is not None and level > 0 and (silent := [i for i in stochastic if steps[i].std == 0]):
        raise ConfigError(f"steps {silent} of {sampler} end without noise, so they cannot be stochastic: drop them.")
    return steps


def _step(grid: SamplingGrid, i: int, sampler: str, level: float) -> Transition:
    a, b, a1, b1 = (float(part[j]) for j in (i, i + 1) for part in (grid.signal, grid.noise))
    if sampler.endswith("_sde") and level > 0:
        k_x, k_p, std = _sde(b, b1, float(grid.noise[1]), level, constant=sampler == "dance_sde")
    else:
        std = b1 * math.sin(level * math.pi / 2) if sampler == "cps" else _ddim_std(a, b, a1, b1, level)
        k_x, k_p = _interpolation(grid.prediction_type, a, b, a1, math.sqrt(max(b1**2 - std**2, 0.0)))
    width = b - b1 if grid.kind == "flow" else abs(k_p)
    return Transition(i, float(grid.times[i]), k_x, k_p, std, width)


def _ddim_std(a: float, b: float, a1: float, b1: float, eta: float) -> float:
    """0 for eta = 0; only variance-preserving levels get here with another one."""
    return eta * (b1 / b) * math.sqrt(max(1 - (a / a1) ** 2, 0.0)) if eta > 0 else 0.0


def _interpolation(prediction_type: str, a: float, b: float, to_clean: float, to_noise: float) -> tuple[float, float]:
    """k_x and k_p of ``to_clean x0 + to_noise eps``; both estimates are linear in x and the prediction."""
    now = [torch.tensor(value, dtype=torch.float64) for value in (a, b)]
    scales = []
    for x, prediction in ((1.0, 0.0), (0.0, 1.0)):
        probe = [torch.tensor(value, dtype=torch.float64) for value in (prediction, x)]
        clean, noise = (estimate(prediction_type, *probe, *now) for estimate in (implied_clean, implied_noise))
        scales.append(float(to_clean * clean + to_noise * noise))
    return scales[0], scales[1]


def _sde(sigma: float, sigma1: float, second: float, level: float, *, constant: bool) -> tuple[float, float, float]:
    """k_x, k_p and tau of the two SDEs.

    At sigma = 1 flow_sde would divide by 0; from the grid's second level upwards it divides by one minus that level.
    """
    dt = sigma1 - sigma
    s = level if constant else level * math.sqrt(sigma / (1 - min(sigma, second)))
    pull = s**2 * dt / (2 * sigma)
    return 1 + pull, dt + pull * (1 - sigma), s * math.sqrt(-dt)

"""How often each timestep is trained on: uniformly, or by one of the densities of flow-matching models.

A density is written as the exact probability of each integer timestep, so bounds and lists restrict it exactly (the
allowed probabilities, divided by their sum) and one number decides a draw: no clamping, which would pile the cut-off
mass on a bound, and no redrawing, which would take an unknown number of draws from a row's generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Schedule

TIMESTEP_DENSITIES = ("uniform", "logit_normal", "shift")
_LEAST_MASS = 1e-9  # below this the table's differences of fp64 numbers have too few digits left


def draw_timestep(
    schedule: Schedule,
    *,
    min_timestep: int = 0,
    max_timestep: int | None = None,
    timesteps: Sequence[int] = (),
    generator: torch.Generator,
    density: str = "uniform",
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    stratum: tuple[int, int] = (0, 1),
) -> int:
    """One timestep for one row.

    Args:
        schedule: gives the range.
        min_timestep: lowest timestep, inclusive.
        max_timestep: highest timestep, inclusive; None means the schedule's last.
        timesteps: draw from this list only (SDXL-Turbo: 249, 499, 749, 999), within the two bounds; a density other
            than uniform weighs the members against each other (a logit-normal one all but drops 999).
        generator: keyed by the row, so that nothing else moves the draw.
        density: ``uniform``, ``logit_normal`` or ``shift``; see :func:`timestep_probabilities`.
        mean, std: of ``logit_normal``; the other densities do not look at them.
        shift: of ``shift``; the other densities do not look at it.
        stratum: (i, m) draws from the i-th (from 0) of m equally probable parts of the density, the quietest first: m
            draws, one from each, cover all noise levels and leave less to chance than m free ones.

    Raises:
        ConfigError: bounds outside the schedule, no timestep between them, an unknown density or impossible parameters
            of it, or a density that is as good as zero everywhere within the bounds.
    """
    last = schedule.num_timesteps - 1
    high = last if max_timestep is None else max_timestep
    if not 0 <= min_timestep <= high <= last:
        raise ConfigError(
            f"timesteps must satisfy 0 <= min_timestep <= max_timestep <= {last}; got min_timestep={min_timestep}, "
            f"max_timestep={max_timestep}."
        )
    outside = [t for t in timesteps if not min_timestep <= t <= high]
    if outside:
        raise ConfigError(f"timesteps lists {outside}, outside min_timestep..max_timestep = {min_timestep}..{high}.")
    allowed = sorted(timesteps) if stratum[1] > 1 else timesteps
    if density != "uniform" or stratum[1] > 1:
        table = timestep_probabilities(schedule.num_timesteps, density, mean=mean, std=std, shift=shift)
        if allowed:
            return int(allowed[_weighted_draw(table[list(allowed)], density, generator, stratum)])
        return min_timestep + _weighted_draw(table[min_timestep : high + 1], density, generator, stratum)
    if not allowed:
        return min_timestep + int(torch.randint(high - min_timestep + 1, (), generator=generator))
    return int(allowed[int(torch.randint(len(allowed), (), generator=generator))])


@lru_cache(maxsize=64)
def timestep_probabilities(
    num_timesteps: int, density: str, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """How probable each timestep is without bounds.

    A noise level s in (0, 1) is drawn and cut to t = floor(s T):

    ``uniform``       s uniform.
    ``logit_normal``  s = sigmoid(mean + std z) with z standard normal (Esser et al. 2024, 2403.03206, section 3.1).
                      A positive mean prefers noise, as in the paper; the diffusers scripts count from the noisy end,
                      so that their ``logit_mean`` has the opposite sign.
    ``shift``         s = k r / (1 + (k - 1) r) with r uniform and k = ``shift``, the way the scheduler spaces its
                      sampling steps (section 5.3.2 there); above 1 prefers noise. Shifting a logit-normal by k is the
                      same as adding ln k to its mean.

    Args:
        num_timesteps: T.
        density: one of the three.
        mean, std: of ``logit_normal``.
        shift: of ``shift``.

    Returns:
        (T,) fp64, sums to 1; shared between callers, not to be written to.

    Raises:
        ConfigError: an unknown density, or std or shift not positive and finite.
    """
    if density not in TIMESTEP_DENSITIES:
        raise ConfigError(f"density must be one of {', '.join(TIMESTEP_DENSITIES)}; got {density!r}.")
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ConfigError(f"a logit-normal density needs a finite mean and a std above 0; got {mean} and {std}.")
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift must be a positive number (1 changes nothing); got {shift}.")
    edges = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    if density == "logit_normal":
        cumulative = torch.special.ndtr((torch.logit(edges) - mean) / std)
    elif density == "shift":
        cumulative = edges / (shift - (shift - 1) * edges)
    else:
        cumulative = edges
    return cumulative.diff()


def _weighted_draw(weights: Tensor, density: str, generator: torch.Generator, stratum: tuple[int, int]) -> int:
    """An index with probability proportional to its weight, from one number of the generator."""
    cumulative = weights.cumsum(0)
    mass = cumulative[-1]
    if mass < _LEAST_MASS:
        raise ConfigError(
            f"the {density} density of timesteps puts as good as nothing ({float(mass):.1e}) on those allowed. Widen "
            "min_timestep..max_timestep or timesteps, or change the density."
        )
    part, parts = stratum
    place = (part + torch.rand((), dtype=torch.float64, generator=generator)) / parts * mass
    # rounding can carry the place onto the very end, which belongs to the last index
    return min(int(torch.searchsorted(cumulative, place, right=True)), len(weights) - 1)

"""Draws follow their density exactly, within bounds and lists, and uniform draws are those of the first release."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy import stats

from diffalign.diffusion import FlowSchedule, draw_timestep, schedule_from, timestep_probabilities
from diffalign.errors import ConfigError

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = FlowSchedule()
DENSITIES = [
    {"density": "logit_normal"},
    {"density": "logit_normal", "mean": 0.8, "std": 0.5},
    {"density": "shift", "shift": 3.0},
    {"density": "shift", "shift": 0.5},
    {"density": "shift"},
]


def draws(count: int, seed: int = 0, schedule: FlowSchedule = FLOW, **options) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [draw_timestep(schedule, generator=generator, **options) for _ in range(count)]


def agrees(drawn: list[int], expected: dict[int, float]) -> bool:
    """Chi-squared test at a level that a correct draw of a fixed seed passes."""
    counts, total = Counter(drawn), sum(expected.values())
    assert set(counts) <= set(expected)
    frequencies = [len(drawn) * p / total for p in expected.values()]
    return stats.chisquare([counts[t] for t in expected], frequencies).pvalue > 1e-3


def test_timesteps_are_uniform_within_inclusive_bounds():
    s = schedule_from(SD)
    assert set(draws(200, schedule=s, min_timestep=10, max_timestep=14)) == {10, 11, 12, 13, 14}
    everything = draws(4000, schedule=s)
    assert min(everything) < 5 and max(everything) > 994
    assert abs(sum(everything) / 4000 - 499.5) < 20
    assert draws(1, min_timestep=999, max_timestep=None) == [999]


def test_uniform_draws_are_the_same_bits_as_ever():
    """Runs of the first release resume with the same timesteps: one integer of the generator each."""
    turbo = [249, 499, 749, 999]
    for options, count, value in (({}, 1000, int), ({"timesteps": turbo}, 4, turbo.__getitem__),
                                  ({"min_timestep": 7, "max_timestep": 90}, 84, lambda i: i + 7)):  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        expected = [value(int(torch.randint(count, (), generator=generator))) for _ in range(50)]
        assert draws(50, 5, **options) == draws(50, 5, density="uniform", mean=9.0, shift=9.0, **options) == expected


def test_turbo_timesteps_and_the_generator_alone_decide():
    turbo = [249, 499, 749, 999]
    for options in ({}, {"density": "logit_normal"}, {"density": "shift", "shift": 3.0}):
        rare = {999} if options.get("density") == "logit_normal" else set()
        assert set(draws(300, timesteps=turbo, **options)) == set(turbo) - rare
        assert draws(100, timesteps=turbo, **options) == draws(100, timesteps=turbo, **options)
        assert draws(100, timesteps=turbo, **options) != draws(100, 1, timesteps=turbo, **options)


@pytest.mark.parametrize("options", DENSITIES)
def test_probabilities_are_those_of_simulated_noise_levels(options):
    """Against the definition: draw the level, cut it to a timestep."""
    generator = torch.Generator().manual_seed(0)
    if options["density"] == "shift":
        shift = options.get("shift", 1.0)
        r = torch.rand(200_000, generator=generator)
        level = shift * r / (1 + (shift - 1) * r)
    else:
        z = torch.randn(200_000, generator=generator)
        level = torch.sigmoid(options.get("mean", 0.0) + options.get("std", 1.0) * z)
    table = timestep_probabilities(20, **options)
    assert table.shape == (20,) and torch.allclose(table.sum(), torch.ones((), dtype=torch.float64))
    counts = torch.bincount((level * 20).floor().long(), minlength=20).double()
    assert (counts / 200_000 - table).abs().max() < 4e-3


@pytest.mark.parametrize("options", DENSITIES)
def test_draws_follow_the_probabilities_with_bounds_and_lists(options):
    few = FlowSchedule(12)
    table = timestep_probabilities(12, **options).tolist()
    assert agrees(draws(1500, schedule=few, **options), dict(enumerate(table)))
    bounded = {t: table[t] for t in range(3, 8)}
    assert agrees(draws(1500, schedule=few, min_timestep=3, max_timestep=7, **options), bounded)
    listed = {t: table[t] for t in (2, 5, 11)}
    assert agrees(draws(1500, schedule=few, timesteps=[2, 5, 11], **options), listed)


def test_known_shapes_of_the_densities():
    logit = timestep_probabilities(1000, "logit_normal")
    assert torch.allclose(logit, logit.flip(0), atol=1e-12) and 400 < int(logit.argmax()) < 600
    # half of the mass lies within |z| < 0.6745
    low, high = (round(1000 / (1 + math.exp(-z))) for z in (-0.6745, 0.6745))
    assert abs(float(logit[low:high].sum()) - 0.5) < 2e-3
    noisier = timestep_probabilities(1000, "logit_normal", mean=1.0)
    place = torch.arange(1000.0, dtype=torch.float64)
    assert (noisier * place).sum() > (logit * place).sum() + 100
    # a shifted logit-normal is one with another mean; a shift of 1 changes nothing
    assert torch.allclose(timestep_probabilities(1000, "shift"), timestep_probabilities(1000, "uniform"))
    assert (timestep_probabilities(1000, "shift", shift=3.0) * place).sum() > 600


@pytest.mark.parametrize("options", [{}, {"density": "logit_normal", "mean": 0.5}, {"min_timestep": 500}])
def test_strata_cut_the_density_into_parts_of_equal_probability(options):
    parts = [draws(300, seed=i, stratum=(i, 4), **options) for i in range(4)]
    assert all(max(low) <= min(high) + 1 for low, high in pairwise(parts))  # a timestep on a cut may be in both
    free = sorted(draws(1200, **options))
    for i, part in enumerate(parts):
        mean = sum(free[300 * i : 300 * (i + 1)]) / 300
        assert sum(part) / 300 == pytest.approx(mean, abs=25)
    turbo = [999, 749, 499, 249]  # a list is cut in order of its timesteps, whatever order it is written in
    assert [draws(3, timesteps=turbo, stratum=(i, 4)) for i in range(4)] == [[t] * 3 for t in reversed(turbo)]


def test_shift_is_the_spacing_of_the_scheduler():
    """The quantiles of the density are the levels that a scheduler with that shift visits."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    visited = scheduler.sigmas[:-1].flip(0).double() if len(scheduler.sigmas) > 1000 else scheduler.sigmas.flip(0)
    cumulative = timestep_probabilities(1000, "shift", shift=3.0).cumsum(0)
    quantiles = torch.arange(1, 1001) / 1000
    edges = torch.searchsorted(cumulative, quantiles.double() - 1e-9).clamp_max(999)
    assert ((edges + 1) / 1000 - visited).abs().max() < 2e-3


def test_one_timestep_is_certain():
    assert draws(5, min_timestep=700, max_timestep=700, density="logit_normal") == [700] * 5
    assert set(draws(50, density="logit_normal", std=1e-3)) <= {498, 499, 500, 501}


@pytest.mark.parametrize(
    "options",
    [{"min_timestep": -1}, {"max_timestep": 1000}, {"min_timestep": 5, "max_timestep": 4}, {"timesteps": [249, 1000]}],
)
@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
def test_impossible_bounds_are_refused(options, density):
    with pytest.raises(ConfigError, match="timestep"):
        draws(1, density=density, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "cosmap"}, "density must be one of uniform, logit_normal, shift; got 'cosmap'"),
        ({"density": "logit_normal", "std": 0.0}, "std above 0; got 0.0 and 0.0"),
        ({"density": "logit_normal", "mean": math.nan}, "finite mean"),
        ({"density": "shift", "shift": 0.0}, "shift must be a positive number"),
        ({"density": "shift", "shift": math.inf}, "shift must be a positive number"),
        ({"density": "logit_normal", "std": 0.05, "min_timestep": 990}, "as good as nothing"),
    ],
)
def test_impossible_densities_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        draws(1, **options)

"""Stochastic samplers against torch's densities, diffusers' samplers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion import NoiseSchedule, drift, flow_grid, log_density, noise_grid, transitions
from diffalign.errors import ConfigError
from tests.tiny import NOISE

LEADING = {**NOISE, "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
Z = torch.tensor([[0.3, -1.2, 0.5, 2.0]])
MOVE = torch.tensor([[0.01, -0.02, 0.03, 0.005]])
TAU = 0.25


def grid_of(steps: int, prediction_type: str = "epsilon", **config):
    config = LEADING | {"prediction_type": prediction_type} | config
    return noise_grid(NoiseSchedule.from_scheduler(config), config, steps)


def one_step(sampler: str, level: float, sigma: float = 0.8, sigma1: float = 0.7):
    return transitions(flow_grid([0.9, sigma, sigma1, 0.0]), sampler, level)[1]


def test_density_is_the_normal_distributions():
    mean = torch.randn(1, 4)
    x = mean + TAU * Z
    assert log_density(x, mean, TAU, "sum").item() == pytest.approx(-1.0205766883391283, abs=1e-5)
    assert log_density(x, mean, TAU).item() == pytest.approx(-0.2551441720847821, abs=1e-5)
    exact = torch.distributions.Normal(mean, TAU).log_prob(x).sum()
    assert log_density(x, mean, TAU, "sum").item() == pytest.approx(exact.item(), abs=1e-5)
    with pytest.raises(ValueError, match="deterministic"):
        log_density(x, mean, 0.0)


def test_moving_the_mean_moves_the_density_as_derived():
    x = TAU * Z
    change = log_density(x, MOVE, TAU) - log_density(x, torch.zeros(1, 4), TAU)
    assert change.item() == pytest.approx(0.04915, abs=1e-6)
    assert change.exp().item() == pytest.approx(1.0503778956082088, abs=1e-6)
    assert drift(MOVE, torch.zeros(1, 4), TAU).item() == pytest.approx(0.0028500, abs=1e-9)
    assert drift(torch.full((1, 65536), 0.03), torch.zeros(1, 65536), TAU).item() == pytest.approx(0.0072, rel=1e-5)
    whole = drift(torch.full((1, 65536), 0.03), torch.zeros(1, 65536), TAU, "sum")
    assert whole.item() == pytest.approx(471.8592, rel=1e-5)


def test_the_log_ratio_is_biased_by_minus_the_drift():
    z = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    change = log_density(TAU * z, MOVE, TAU) - log_density(TAU * z, torch.zeros(1, 4), TAU)
    spread = float(change.std()) / math.sqrt(len(change))
    assert change.mean().item() == pytest.approx(-0.00285, abs=4 * spread)
    assert abs(((change + 0.00285) * TAU).mean().item()) < 4 * spread * TAU


@pytest.mark.parametrize(
    ("steps", "index", "tau", "k_x", "k_p"),
    [
        (50, 0, 0.454463, 1.122852, -0.232936),
        (50, 25, 0.287685, 1.046157, -0.108079),
        (50, 48, 0.039480, 1.009096, -0.129287),
        (50, 49, 0.020648, 1.000428, -0.020714),
        (20, 0, 0.644391, 1.310472, -0.549634),
        (20, 18, 0.040597, 1.024821, -0.220477),
    ],
)
def test_ddim_coefficients(steps, index, tau, k_x, k_p):
    step = transitions(grid_of(steps), "ddim", 1.0)[index]
    assert (step.std, step.x_scale, step.prediction_scale) == pytest.approx((tau, k_x, k_p), abs=2e-6)
    assert step.width == abs(step.prediction_scale)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("sampler", ["ddim", "cps"])
def test_signal_and_noise_of_the_next_level_are_kept_for_every_noise_level(prediction_type, sampler):
    """With the exact prediction for one picture x0, E(x') = a' x0 and Var(x') = b'^2."""
    grid = grid_of(25, prediction_type)
    for level in (0.0, 0.3, 0.7, 1.0):
        for i, step in enumerate(transitions(grid, sampler, level)):
            a, b = float(grid.signal[i]), float(grid.noise[i])
            # prediction for x = a x0 + b e, as (coefficient of x0, coefficient of e)
            clean, noise = {"epsilon": (0, 1), "v_prediction": (-b, a), "sample": (1, 0)}[prediction_type]
            assert step.x_scale * a + step.prediction_scale * clean == pytest.approx(
                float(grid.signal[i + 1]), abs=1e-9
            )
            power = (step.x_scale * b + step.prediction_scale * noise) ** 2 + step.std**2
            assert power == pytest.approx(float(grid.noise[i + 1]) ** 2, abs=1e-9)


@pytest.mark.parametrize("steps", [10, 20, 25, 30, 50])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_step_equals_diffusers_ddim(steps, eta, prediction_type):
    scheduler = DDIMScheduler(**{**LEADING, "prediction_type": prediction_type})
    scheduler.set_timesteps(steps)
    x, prediction, z = torch.randn(3, 1, 4, 8, 8).unbind(0)
    for step, t in zip(transitions(grid_of(steps, prediction_type), "ddim", eta), scheduler.timesteps, strict=True):
        assert step.time == t
        expected = scheduler.step(prediction, int(t), x, eta=eta, variance_noise=z).prev_sample
        assert torch.allclose(step.draw(step.mean(x, prediction), z), expected, atol=2e-6), step


def test_eta_one_between_neighbours_is_the_ddpm_posterior():
    scheduler = DDPMScheduler(**NOISE, clip_sample=False)
    scheduler.set_timesteps(1000)
    steps = transitions(grid_of(1000, timestep_spacing="linspace", steps_offset=0), "ddim", 1.0)
    x, prediction = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for i in (0, 300, 900, 990):
        t = 999 - i
        assert steps[i].time == t
        assert steps[i].std ** 2 == pytest.approx(float(scheduler._get_variance(t)), rel=1e-4)
        generator = torch.Generator().manual_seed(0)
        theirs = scheduler.step(prediction, t, x, generator=generator).prev_sample
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(theirs, steps[i].draw(steps[i].mean(x, prediction), z), atol=1e-5)


def test_steps_end_where_the_list_says():
    for spacing, steps in (("leading", 7), ("trailing", 7), ("linspace", 7)):
        grid = grid_of(steps, timestep_spacing=spacing, steps_offset=0)
        power = NoiseSchedule.from_scheduler(LEADING).levels(torch.float64)[0]
        assert torch.equal(grid.signal[1:-1], power[grid.times[1:].long() + 1])
    assert grid_of(5).noise[-1] == pytest.approx(math.sqrt(1 - 0.99915), abs=1e-6)
    assert grid_of(5, set_alpha_to_one=True).noise[-1] == 0


def test_flow_sde_constants():
    step = one_step("flow_sde", 0.7)
    assert step.std == pytest.approx(0.4427188724235732, abs=1e-12)
    assert (step.x_scale, step.prediction_scale) == pytest.approx((0.8775, -0.1245), abs=1e-12)
    assert step.width == pytest.approx(0.1)
    dance = one_step("dance_sde", 1.4)  # s of the flow SDE at this step
    assert (dance.std, dance.x_scale) == pytest.approx((step.std, step.x_scale), abs=1e-12)
    assert dance.prediction_scale == pytest.approx(step.prediction_scale, abs=1e-12)


def test_cps_constants():
    step = one_step("cps", 0.7)
    assert step.std == pytest.approx(0.6237045669318574, abs=1e-12)
    assert math.sqrt(0.49 - step.std**2) == pytest.approx(0.3177933498176829, abs=1e-12)


@pytest.mark.parametrize(("sampler", "variance"), [("flow_sde", 0.52950625), ("cps", 0.49)])
def test_how_much_noise_a_flow_step_leaves(sampler, variance):
    step = one_step(sampler, 0.7)
    # x = 0.2 x0 + 0.8 e and v = e - x0
    assert (step.x_scale * 0.8 + step.prediction_scale) ** 2 + step.std**2 == pytest.approx(variance, abs=1e-12)
    clean = step.x_scale * 0.2 - step.prediction_scale
    assert clean == pytest.approx(0.3, abs=1e-12 if sampler == "cps" else 0.02)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_every_sampler_is_the_euler_step(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    grid = flow_grid(scheduler.sigmas)
    x, prediction = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for sampler in ("flow_sde", "dance_sde", "cps"):
        scheduler._step_index = None
        for step, t in zip(transitions(grid, sampler, 0.0), scheduler.timesteps, strict=True):
            assert step.time == pytest.approx(float(t), rel=1e-6)
            theirs = scheduler.step(prediction, t, x).prev_sample
            assert torch.allclose(step.draw(step.mean(x, prediction), None), theirs, atol=1e-6)


def test_the_sde_reaches_the_data_as_steps_grow():
    """1-D data N(2, 0.5^2), exact velocity: moments are linear, so they are followed without sampling."""

    def excess(steps: int) -> float:
        grid = flow_grid(torch.linspace(0.95, 0, steps + 1, dtype=torch.float64))
        a, b = float(grid.signal[0]), float(grid.noise[0])
        mean, variance = 2.0 * a, 0.25 * a**2 + b**2
        for i, step in enumerate(transitions(grid, "flow_sde", 0.7)):
            a, b = float(grid.signal[i]), float(grid.noise[i])
            gain = (b - 0.25 * a) / (0.25 * a**2 + b**2)  # E[e - x0 | x] = -2 + gain (x - 2 a)
            slope = step.x_scale + step.prediction_scale * gain
            mean = slope * mean + step.prediction_scale * (-2.0 - gain * a * 2.0)
            variance = slope**2 * variance + step.std**2
        assert mean == pytest.approx(2.0, abs=1e-9)
        return variance - 0.25

    coarse, fine = excess(400), excess(800)
    assert abs(coarse) < 1e-3
    assert coarse / fine == pytest.approx(2.0, rel=0.02)


def test_the_first_step_of_a_flow_is_finite():
    step = transitions(flow_grid([1.0, 0.96, 0.5, 0.0]), "flow_sde", 0.7)[0]
    assert step.std == pytest.approx(0.7 * math.sqrt(1 / 0.04) * math.sqrt(0.04))
    inside = transitions(flow_grid([0.999, 0.96, 0.5, 0.0]), "flow_sde", 0.7)[0]
    assert inside.std < 1.0  # 1 / (1 - 0.999) is not used either


def test_only_chosen_steps_inject_noise():
    steps = transitions(grid_of(6), "ddim", 1.0, stochastic=[1, 3])
    assert [step.std > 0 for step in steps] == [False, True, False, True, False, False]
    with pytest.raises(ValueError, match="needs noise"):
        steps[1].draw(torch.zeros(1, 2), None)


def test_unfit_samplers_are_refused():
    with pytest.raises(ConfigError, match="ddim, cps"):
        transitions(grid_of(4), "flow_sde")
    with pytest.raises(ConfigError, match="flow_sde, dance_sde, cps"):
        transitions(flow_grid([1.0, 0.0]), "ddim")
    with pytest.raises(ConfigError, match="noise_level"):
        transitions(grid_of(4), "ddim", 1.5)
    with pytest.raises(ConfigError, match="end without noise"):
        transitions(flow_grid([1.0, 0.5, 0.0]), "cps", 0.8, stochastic=[1])
    with pytest.raises(ConfigError, match="fall"):
        flow_grid([1.0, 0.5, 0.6, 0.0])
    with pytest.raises(ConfigError, match=r"1\.\.1000"):
        grid_of(1001)

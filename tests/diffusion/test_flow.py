"""The flow schedule agrees with diffusers, converts exactly between spaces, and has the surface of the other one."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from diffalign.diffusion import FlowSchedule, NoiseSchedule, Schedule, schedule_from
from diffalign.errors import ConfigError

T = torch.tensor([0, 1, 100, 500, 998, 999])


def tensors(n: int = len(T), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.02}])
def test_agrees_with_diffusers_whatever_the_spacing_of_its_sampling(options):
    theirs, plain = FlowMatchEulerDiscreteScheduler(**options), FlowMatchEulerDiscreteScheduler()
    ours = FlowSchedule.from_scheduler(theirs.config)
    x0, noise = tensors()
    # theirs counts down from pure noise and knows a timestep by the number the network is told
    expected = plain.scale_noise(x0, ours.time(T), noise)
    assert torch.allclose(ours.add_noise(x0, noise, T), expected, atol=1e-6)
    assert torch.equal(ours.time(T), plain.timesteps.flip(0)[T])
    assert torch.allclose(ours.sigma(T), plain.sigmas.flip(0)[T])


def test_known_values():
    ours = FlowSchedule()
    assert torch.equal(ours.sigma(T), torch.tensor([0.001, 0.002, 0.101, 0.501, 0.999, 1.0]))
    assert torch.equal(ours.time(T), torch.tensor([1.0, 2.0, 101.0, 501.0, 999.0, 1000.0]))
    assert ours.time(T).dtype == torch.float32
    assert ours.snr(T)[-1] == 0 and torch.allclose(ours.snr(T)[3], torch.tensor((0.499 / 0.501) ** 2))
    assert FlowSchedule(4).num_timesteps == 4 and ours.num_timesteps == 1000
    x0, noise = tensors()
    assert torch.equal(ours.add_noise(x0, noise, T)[-1], noise[-1])


def test_errors_convert_between_spaces():
    """Oracle 7.1.8 for flow: the velocity's error times (1 - sigma)^2 is the noise's, times sigma^2 the picture's."""
    ours = FlowSchedule()
    x0, noise = tensors(dtype=torch.float64)
    sigma = ((T + 1).double() / 1000).view(-1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * noise
    u_hat = (noise - x0) + 0.3 * x0.flip(0)
    eps_error = (noise - (x_t + (1 - sigma) * u_hat)).square().flatten(1).mean(1).float()
    x0_error = (x0 - (x_t - sigma * u_hat)).square().flatten(1).mean(1).float()
    assert torch.allclose(ours.denoising_error(u_hat, x0, noise, T, "epsilon"), eps_error, rtol=1e-5)
    assert torch.allclose(ours.denoising_error(u_hat, x0, noise, T, "x0"), x0_error, rtol=1e-5)
    native = ours.denoising_error(u_hat, x0, noise, T, "native")
    assert torch.allclose(native, (noise - x0 - u_hat).square().flatten(1).mean(1).float(), rtol=1e-5)
    assert torch.equal(ours.denoising_error(u_hat, x0, noise, T), native)
    assert eps_error[-1] == 0 and ours.denoising_error(u_hat, x0, noise, T, "epsilon")[-1] == 0
    with pytest.raises(ConfigError, match="loss_space must be one of default, native, epsilon, x0; got 'velocity'"):
        ours.denoising_error(u_hat, x0, noise, T, "velocity")


def test_perfect_predictions_convert_back():
    ours = FlowSchedule()
    x0, noise = tensors()
    x_t, perfect = ours.add_noise(x0, noise, T), ours.target(x0, noise, T)
    assert torch.equal(perfect, noise - x0)
    assert torch.allclose(ours.to_epsilon(perfect, x_t, T), noise, atol=1e-5)
    assert torch.allclose(ours.to_x0(perfect, x_t, T), x0, atol=1e-5)
    assert ours.denoising_error(perfect, x0, noise, T).max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_is_fp32_whatever_comes_in(dtype):
    ours = FlowSchedule()
    x0, noise = tensors(dtype=dtype)
    x_t = ours.add_noise(x0, noise, T)
    results = [
        x_t, ours.target(x0, noise, T), ours.to_epsilon(noise, x_t, T), ours.to_x0(noise, x_t, T),
        ours.denoising_error(noise, x0, noise, T), ours.snr(T), ours.sigma(T), ours.time(T),
    ]  # fmt: skip
    assert {r.dtype for r in results} == {torch.float32}
    assert torch.equal(x_t, ours.add_noise(x0.float(), noise.float(), T))


def test_errors_have_gradients():
    x0, noise = tensors()
    prediction = torch.zeros_like(x0).requires_grad_()
    for space in ("native", "epsilon", "x0"):
        (gradient,) = torch.autograd.grad(
            FlowSchedule().denoising_error(prediction, x0, noise, T, space).sum(), prediction
        )
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("schedule", [FlowSchedule(10), NoiseSchedule(torch.linspace(0.9, 0.0, 10), "v_prediction")])
def test_levels_are_the_clean_picture_and_then_the_timesteps(schedule):
    a, b = schedule.levels(torch.float64)
    assert a.shape == b.shape == (11,) and a.dtype == b.dtype == torch.float64
    assert (a[0], b[0]) == (1, 0)
    x0, noise = (x[:1] for x in tensors())
    for t in range(10):
        mixed = a[t + 1] * x0.double() + b[t + 1] * noise.double()
        assert torch.allclose(schedule.add_noise(x0, noise, torch.tensor([t])), mixed.float(), atol=1e-6)
    assert schedule.levels()[0].dtype == torch.float32


def test_both_classes_offer_all_that_the_protocol_names():
    names = [name for name in vars(Schedule) if not name.startswith("_")]
    assert {"time", "add_noise", "target", "denoising_error", "levels", "snr", "num_timesteps"} <= set(names)
    for cls in (NoiseSchedule, FlowSchedule):
        for name in names:
            theirs, ours = getattr(Schedule, name), getattr(cls, name)
            if not isinstance(theirs, property):
                assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_the_scheduler_says_which_schedule():
    flow = schedule_from(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    assert isinstance(flow, FlowSchedule) and flow.prediction_type == "flow"
    for scheduler in (DDIMScheduler(), EulerDiscreteScheduler(prediction_type="v_prediction")):
        vp = schedule_from(scheduler.config)
        assert isinstance(vp, NoiseSchedule) and vp.prediction_type == scheduler.config.prediction_type
    assert torch.equal(vp.time(T), T)
    assert schedule_from(DDIMScheduler().config, zero_terminal_snr=True).alphas_cumprod[-1] == 0
    assert isinstance(schedule_from({"trained_betas": [0.1, 0.2], "prediction_type": "epsilon"}), NoiseSchedule)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="zero_terminal_snr does not apply to a flow model"):
        schedule_from(FlowMatchEulerDiscreteScheduler().config, zero_terminal_snr=True)
    heun = {**FlowMatchHeunDiscreteScheduler().config, "_class_name": "FlowMatchHeunDiscreteScheduler"}
    for config in (heun, FlowMatchHeunDiscreteScheduler().config, DDIMScheduler().config, {}):
        with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler"):
            FlowSchedule.from_scheduler(config)
    with pytest.raises(ConfigError, match="FlowMatchEulerDiscreteScheduler"):
        schedule_from(heun)
    with pytest.raises(ConfigError, match="invert_sigmas"):
        schedule_from(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ConfigError, match="use_flow_sigmas"):
        schedule_from(solver.config)
    with pytest.raises(ConfigError, match="num_timesteps must be at least 1"):
        FlowSchedule(0)

"""The schedule agrees with diffusers, converts exactly between spaces, and never computes in half precision."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion import NoiseSchedule
from diffalign.errors import ConfigError

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
T = torch.tensor([0, 1, 100, 500, 998, 999])


def schedule(prediction_type: str = "epsilon", **kwargs) -> NoiseSchedule:
    return NoiseSchedule.from_scheduler({**SD, "prediction_type": prediction_type}, **kwargs)


def tensors(n: int = len(T), dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(n, 4, 8, 8, generator=generator).to(dtype) for _ in range(2))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rescale", [False, True])
def test_agrees_with_diffusers(kind, rescale):
    theirs = DDPMScheduler(**{**SD, "beta_schedule": kind}, rescale_betas_zero_snr=rescale, clip_sample=False)
    ours = NoiseSchedule.from_scheduler(theirs.config)
    # diffusers accumulates a thousand products in fp32, so it is a few 1e-7 off itself (1e-5 relative at worst)
    assert (ours.alphas_cumprod - theirs.alphas_cumprod).abs().max() < 2e-6
    x0, noise = tensors()
    assert torch.allclose(ours.add_noise(x0, noise, T), theirs.add_noise(x0, noise, T), atol=5e-4 if rescale else 2e-5)
    v = NoiseSchedule.from_scheduler({**theirs.config, "prediction_type": "v_prediction"}).target(x0, noise, T)
    assert torch.allclose(v, theirs.get_velocity(x0, noise, T), atol=5e-4 if rescale else 2e-5)


def test_every_scheduler_class_describes_the_same_process():
    ddim, euler = DDIMScheduler(**SD), EulerDiscreteScheduler(**SD)
    a, b = (NoiseSchedule.from_scheduler(s.config).alphas_cumprod for s in (ddim, euler))
    assert torch.equal(a, b)


def test_known_values_of_the_sd_schedule():
    # offline.md section 0: noise-to-signal ratios
    ratio = schedule().snr(torch.tensor([0, 100, 500, 999])).rsqrt()
    assert torch.allclose(ratio, torch.tensor([0.0292, 0.344, 1.618, 14.61]), rtol=2e-3)


def test_trained_betas():
    betas = [0.1, 0.2, 0.3]
    ours = NoiseSchedule.from_scheduler({"trained_betas": betas, "prediction_type": "epsilon"})
    assert torch.allclose(ours.alphas_cumprod, torch.tensor([0.9, 0.72, 0.504]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_is_fp32_whatever_comes_in(dtype):
    s = schedule("v_prediction")
    x0, noise = tensors(dtype=dtype)
    x_t = s.add_noise(x0, noise, T)
    results = [
        x_t, s.target(x0, noise, T), s.to_epsilon(noise, x_t, T), s.to_x0(noise, x_t, T),
        s.denoising_error(noise, x0, noise, T), s.snr(T), s.alphas_cumprod,
    ]  # fmt: skip
    assert {r.dtype for r in results} == {torch.float32}
    # the half-precision inputs are used as they are: only the inputs were rounded, not the arithmetic
    exact = s.add_noise(x0.float(), noise.float(), T)
    assert torch.equal(x_t, exact)


def test_error_of_half_precision_predictions_is_not_rounded_to_half():
    """Oracle 7.1.9: an error of 0.1 computed in fp16 moves the DPO logit; ours does not."""
    s = schedule()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 4, 64, 64, generator=generator)
    prediction = (noise + 0.316 * torch.randn(noise.shape, generator=generator)).half()
    t = torch.full((8,), 500)
    exact = (noise.double() - prediction.double()).square().flatten(1).mean(1)
    ours = s.denoising_error(prediction, torch.zeros_like(noise), noise, t)
    fp16 = (noise.half() - prediction).square().flatten(1).mean(1)
    assert (2500 * (ours.double() - exact)).abs().max() < 1e-2
    assert (2500 * (fp16.double() - exact)).abs().max() > 1e-2


def test_v_reexpressed_from_epsilon_has_the_same_epsilon_error():
    """Oracle 7.1.8: the A_t-weighted v-error is the epsilon error, to 1e-5."""
    eps_model, v_model, x0_model = (schedule(p) for p in ("epsilon", "v_prediction", "sample"))
    x0, noise = tensors()
    x_t = eps_model.add_noise(x0, noise, T)
    eps_hat = noise + 0.3 * tensors()[0].flip(0)
    a = eps_model.alphas_cumprod[T].sqrt().view(-1, 1, 1, 1)
    b = (1 - eps_model.alphas_cumprod[T]).sqrt().view(-1, 1, 1, 1)
    v_hat = (eps_hat - b * x_t) / a
    x0_hat = (x_t - b * eps_hat) / a
    reference = eps_model.denoising_error(eps_hat, x0, noise, T, "epsilon")
    assert torch.allclose(v_model.denoising_error(v_hat, x0, noise, T, "epsilon"), reference, rtol=1e-5)
    # at t = 0 the x0 error is a thousandth of the epsilon error: fp32 of x_t itself limits the comparison there
    assert torch.allclose(x0_model.denoising_error(x0_hat, x0, noise, T, "epsilon")[1:], reference[1:], rtol=1e-4)
    # and in x0 space all three agree as well
    in_x0 = v_model.denoising_error(v_hat, x0, noise, T, "x0")
    assert torch.allclose(eps_model.denoising_error(eps_hat, x0, noise, T, "x0"), in_x0, rtol=1e-4)
    assert torch.allclose(x0_model.denoising_error(x0_hat, x0, noise, T, "native")[1:], in_x0[1:], rtol=1e-4)


def test_spaces_are_native_where_named_and_epsilon_by_default():
    x0, noise = tensors()
    prediction = torch.zeros_like(x0)
    v = schedule("v_prediction")
    native = v.denoising_error(prediction, x0, noise, T, "native")
    assert torch.allclose(native, v.target(x0, noise, T).square().flatten(1).mean(1))
    assert torch.equal(
        v.denoising_error(prediction, x0, noise, T), v.denoising_error(prediction, x0, noise, T, "epsilon")
    )
    assert torch.allclose(v.denoising_error(prediction, x0, noise, T), native * v.alphas_cumprod[T])
    with pytest.raises(ConfigError, match="loss_space must be one of default, native, epsilon, x0; got 'eps'"):
        v.denoising_error(prediction, x0, noise, T, "eps")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_perfect_predictions_convert_back(prediction_type):
    s = schedule(prediction_type)
    x0, noise = tensors()
    x_t, perfect = s.add_noise(x0, noise, T), s.target(x0, noise, T)
    assert torch.allclose(s.to_epsilon(perfect, x_t, T)[2:], noise[2:], atol=1e-4)
    assert torch.allclose(s.to_x0(perfect, x_t, T), x0, atol=1e-4)
    assert s.denoising_error(perfect, x0, noise, T).max() == 0


def test_zero_terminal_snr_is_exact_and_finite():
    x0, noise = tensors()
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        s = schedule(prediction_type, zero_terminal_snr=True)
        assert s.alphas_cumprod[-1] == 0 and s.snr(T)[-1] == 0
        assert torch.allclose(s.alphas_cumprod[0], schedule().alphas_cumprod[0])
        x_t = s.add_noise(x0, noise, T)
        assert torch.equal(x_t[-1], noise[-1])
        prediction = torch.zeros_like(x0).requires_grad_()
        for space in ("native", "epsilon", "x0"):
            error = s.denoising_error(prediction, x0, noise, T, space)
            (gradient,) = torch.autograd.grad(error.sum(), prediction)
            assert error.isfinite().all() and gradient.isfinite().all()
        assert s.to_x0(noise, x_t, T).isfinite().all() and s.to_epsilon(noise, x_t, T).isfinite().all()
    v = schedule("v_prediction", zero_terminal_snr=True)
    assert v.denoising_error(noise, x0, noise, T, "epsilon")[-1] == 0
    assert v.denoising_error(noise, x0, noise, T, "x0")[-1] > 0
    eps = schedule(zero_terminal_snr=True)
    assert eps.denoising_error(x0, x0, noise, T, "x0")[-1] == 0
    assert (eps.to_x0(x0, noise, T)[-1] == 0).all()


def test_what_is_no_vp_process_is_refused():
    with pytest.raises(ConfigError, match="flow-matching"):
        NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler().config)
    with pytest.raises(ConfigError, match="beta_schedule must be one of"):
        NoiseSchedule.from_scheduler({**SD, "beta_schedule": "sigmoid"})
    with pytest.raises(ConfigError, match="prediction_type must be one of"):
        NoiseSchedule.from_scheduler({**SD, "prediction_type": "velocity"})
    with pytest.raises(ConfigError, match="fall"):
        NoiseSchedule(torch.tensor([0.5, 0.6]), "epsilon")

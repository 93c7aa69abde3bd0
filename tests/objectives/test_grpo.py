"""The clipped policy gradient against hand-computed values and autograd."""

from __future__ import annotations

import pytest
import torch

from diffalign.diffusion import drift, log_density
from diffalign.objectives import grpo_loss, step_kl

Z = torch.tensor([[0.3, -1.2, 0.5, 2.0]])
MOVE = torch.tensor([[0.01, -0.02, 0.03, 0.005]])
TAU = 0.25


def probabilities(move: torch.Tensor, convention: str = "mean"):
    """New and old log-probability of x' = tau z, where the mean was 0 and is ``move``."""
    old = torch.zeros(1, 4)
    return log_density(TAU * Z, move, TAU, convention), log_density(TAU * Z, old, TAU, convention)


def test_first_gradient_is_the_policy_gradient():
    move = torch.zeros(1, 4, requires_grad=True)
    out = grpo_loss(*probabilities(move), torch.tensor([1.5]))
    assert out.stats["ratio"].item() == 1.0
    out.loss.sum().backward()
    assert torch.allclose(move.grad, torch.tensor([[-0.45, 1.8, -0.75, -3.0]]), atol=1e-5)


def test_first_gradient_with_ratio_norm():
    for width in (1.0, 0.1):
        move = torch.zeros(1, 4, requires_grad=True)
        bias = drift(move, torch.zeros(1, 4), TAU)
        out = grpo_loss(*probabilities(move), torch.tensor([1.5]), normalise=(bias, TAU, width))
        out.loss.sum().backward()
        assert torch.allclose(move.grad, torch.tensor([[-0.1125, 0.45, -0.1875, -0.75]]) / width, atol=1e-5)


def test_ratio_norm_does_not_depend_on_tau():
    for tau in (0.02, 0.25, 1.0):
        new, old = log_density(tau * Z, MOVE, tau), log_density(tau * Z, torch.zeros(1, 4), tau)
        out = grpo_loss(new, old, torch.ones(1), normalise=(drift(MOVE, torch.zeros(1, 4), tau), tau, 1.0))
        assert out.stats["log_ratio"].item() == pytest.approx(0.013, abs=1e-5)
        assert out.stats["ratio"].item() == pytest.approx(1.0130848673598092, abs=1e-5)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "flows"),
    [(0.04915, 1.0, -1.0001, False), (0.04915, -1.0, 1.0503779, True)]
    + [(-0.0512933, 1.0, -0.95, True), (-0.0512933, -1.0, 0.9999, False)],
)
def test_clip_side(log_ratio, advantage, loss, flows):
    new = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    out = grpo_loss(new, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]), clip_range=1e-4)
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(loss, abs=1e-6)
    assert (new.grad.item() != 0) == flows
    assert out.stats["clip_share"].item() == float(not flows)


def test_nothing_is_clipped_inside_the_range():
    new = torch.tensor([0.0, 5e-5, -5e-5], dtype=torch.float64, requires_grad=True)
    out = grpo_loss(new, torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0]), clip_range=1e-4)
    out.loss.sum().backward()
    assert (new.grad != 0).all()
    assert out.stats["clip_share"].tolist() == [0.0, 0.0, 0.0]


def test_sum_convention_is_d_times_mean():
    mean, total = (
        grpo_loss(*probabilities(MOVE, convention), torch.ones(1)).stats["log_ratio"].item()
        for convention in ("mean", "sum")
    )
    assert total == pytest.approx(4 * mean, rel=1e-5)


@pytest.mark.parametrize(("size", "nats"), [(16_384, 1.6384), (65_536, 6.5536), (262_144, 26.2144)])
def test_a_clip_range_of_one_in_ten_thousand_in_nats(size, nats):
    """SD1.5 at 512 px; SDXL at 1024 and SD3 at 512; FLUX at 1024. The mean log-ratio here is 1e-4."""
    tau = 0.25
    move = torch.full((1, size), tau * (1 - (1 - 2e-4) ** 0.5))  # m/tau - m^2/(2 tau^2) = 1e-4 where z = 1
    x, old = torch.full((1, size), tau), torch.zeros(1, size)
    mean, total = (log_density(x, move, tau, c) - log_density(x, old, tau, c) for c in ("mean", "sum"))
    assert mean.item() == pytest.approx(1e-4, rel=1e-3)
    assert total.item() == pytest.approx(nats, rel=1e-3)


def test_no_advantage_no_gradient():
    new = torch.tensor([0.3, -0.2], requires_grad=True)
    out = grpo_loss(new, torch.zeros(2), torch.zeros(2))
    out.loss.sum().backward()
    assert torch.equal(new.grad, torch.zeros(2))
    assert torch.equal(out.loss.detach(), torch.zeros(2))


@pytest.mark.parametrize("form", ["density", "prediction"])
def test_kl_pulls_back_to_the_reference(form):
    reference = torch.zeros(2, 4, 2, 2)
    student = torch.zeros(2, 4, 2, 2, requires_grad=True)
    at_reference = step_kl(student, reference, scale=-0.2, std=TAU, form=form)
    at_reference.sum().backward()
    assert torch.equal(at_reference.detach(), torch.zeros(2, dtype=torch.float64))
    assert torch.equal(student.grad, torch.zeros_like(student))
    moved = torch.full((2, 4, 2, 2), 0.15, requires_grad=True)
    kl = step_kl(moved, reference, scale=-0.2, std=TAU, form=form)
    assert kl[0].item() == pytest.approx(0.0072 if form == "density" else 0.0225, rel=1e-5)
    out = grpo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), kl=kl, kl_weight=2.0)
    assert out.loss[0].item() == pytest.approx(2 * kl[0].item())
    out.loss.sum().backward()
    assert bool((moved.grad > 0).all())


@pytest.mark.parametrize("form", ["density", "prediction"])
def test_gradient_of_the_kl(form):
    """d/dp of k^2 mean(d^2) / (2 tau^2) is k^2 d / (D tau^2), and of mean(d^2) it is 2 d / D."""
    scale, reference = -0.2, torch.randn(2, 4, 2, 2)
    student = torch.randn(2, 4, 2, 2, requires_grad=True)
    step_kl(student, reference, scale=scale, std=TAU, form=form).sum().backward()
    factor = scale**2 / TAU**2 if form == "density" else 2.0
    torch.testing.assert_close(student.grad, factor * (student.detach() - reference) / 16)


def test_the_density_form_is_the_drift_of_the_means():
    student, reference = torch.randn(2, 3, 4, 8, 8).unbind(0)
    kl = step_kl(student, reference, scale=-0.2, std=TAU, form="density")
    assert torch.allclose(kl, drift(-0.2 * student, -0.2 * reference, TAU), rtol=1e-5)


def test_inputs_that_cannot_be_meant():
    one, zero = torch.ones(1), torch.zeros(1)
    with pytest.raises(ValueError, match="shape|must be"):
        grpo_loss(zero, zero, torch.zeros(2))
    with pytest.raises(ValueError, match="digits"):
        grpo_loss(zero.bfloat16(), zero, one)
    with pytest.raises(ValueError, match="NaN"):
        grpo_loss(zero, zero, torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="clip_range"):
        grpo_loss(zero, zero, one, clip_range=0.0)
    with pytest.raises(ValueError, match="no effect"):
        grpo_loss(zero, zero, one, kl_weight=0.1)
    with pytest.raises(ValueError, match="form"):
        step_kl(zero[None], zero[None], scale=1.0, std=1.0, form="reverse")


def test_neither_the_old_policy_nor_the_advantage_gets_a_gradient():
    new, old, advantage = (torch.tensor([value], requires_grad=True) for value in (-1.0, -1.0, 0.5))
    grpo_loss(new, old, advantage).loss.sum().backward()
    assert new.grad is not None and old.grad is None and advantage.grad is None

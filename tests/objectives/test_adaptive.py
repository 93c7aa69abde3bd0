"""The adaptive beta: its directions, where it settles, its bounds, and that it resumes exactly."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives import AdaptiveBeta, dpo_loss


def factor_of(beta: float, improvement: torch.Tensor) -> float:
    """Mean gradient factor of pairs whose gap improved by so much against the reference."""
    policy = torch.stack([0.1 - improvement, torch.full_like(improvement, 0.1)], 1)
    stats = dpo_loss(policy, torch.full_like(policy, 0.1), beta=beta).stats
    return stats["gradient_factor"].mean().item()


@pytest.mark.parametrize(("factor", "direction"), [(0.05, -1), (0.29, -1), (0.3, 0), (0.4, 1), (0.5, 0), (0.9, 0)])
def test_saturated_lowers_unsaturated_raises_wrong_holds(factor, direction):
    adaptive = AdaptiveBeta(1000.0, target=0.3)
    beta = adaptive.update(factor)
    assert math.isclose(beta, 1000.0, rel_tol=1e-12) if direction == 0 else (beta - 1000) * direction > 0
    assert beta == adaptive.beta
    assert beta == pytest.approx(1000 * math.exp(0.02 * (factor - 0.3) * (factor < 0.5)), rel=1e-12)


@pytest.mark.parametrize("start", [1000.0, 50000.0])
def test_it_settles_where_the_target_is_without_overshoot(start):
    generator = torch.Generator().manual_seed(0)
    improvement = 4e-4 + 1e-4 * torch.rand(256, generator=generator, dtype=torch.float64)
    adaptive = AdaptiveBeta(start, target=0.2, minimum=10.0, maximum=1e6)
    betas = [adaptive.update(factor_of(adaptive.beta, improvement)) for _ in range(2000)]
    assert factor_of(adaptive.beta, improvement) == pytest.approx(0.2, abs=1e-3)
    final, steps = betas[-1], [b - a for a, b in zip(betas, betas[1:], strict=False)]
    assert all(step * (final - start) >= -1e-9 * final for step in steps)


def test_at_the_reference_it_holds():
    adaptive = AdaptiveBeta(5000.0)
    for _ in range(100):
        adaptive.update(factor_of(adaptive.beta, torch.zeros(8, dtype=torch.float64)))
    assert adaptive.beta == 5000.0


def test_bounds_hold():
    adaptive = AdaptiveBeta(1000.0, rate=5.0, minimum=800.0, maximum=1100.0, smoothing=0.0)
    assert [adaptive.update(0.0) for _ in range(3)] == [800.0] * 3
    assert [adaptive.update(0.49) for _ in range(3)] == [1100.0] * 3
    default = AdaptiveBeta(1000.0)
    assert (default.minimum, default.maximum) == (100.0, 10000.0)


def test_one_odd_batch_moves_it_little():
    steady, sudden = AdaptiveBeta(1000.0, smoothing=0.9), AdaptiveBeta(1000.0, smoothing=0.0)
    for adaptive in (steady, sudden):
        adaptive.update(0.3)
        adaptive.update(0.0)
    assert sudden.beta < steady.beta < 1000.0


def test_it_resumes_exactly():
    factors = [0.5, 0.45, 0.3, 0.2, 0.1, 0.35, 0.4]
    whole, first = AdaptiveBeta(), AdaptiveBeta()
    expected = [whole.update(factor) for factor in factors]
    for factor in factors[:3]:
        first.update(factor)
    second = AdaptiveBeta()
    second.load_state_dict(first.state_dict())
    assert [second.update(factor) for factor in factors[3:]] == expected[3:]
    assert second.state_dict() == whole.state_dict()
    fresh = AdaptiveBeta()
    fresh.load_state_dict(AdaptiveBeta().state_dict())
    assert fresh.factor is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be"),
        ({"target": 0.5}, "target"),
        ({"target": 0.0}, "target"),
        ({"rate": -1.0}, "rate"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"minimum": 6000.0}, "minimum <= beta"),
        ({"maximum": 10.0}, "beta <= maximum"),
        ({"maximum": math.inf}, "maximum"),
    ],
)
def test_bad_settings_are_refused_with_a_word(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBeta(**options)


@pytest.mark.parametrize("factor", [math.nan, -0.1, 1.1])
def test_a_bad_factor_is_refused_and_leaves_the_state(factor):
    adaptive = AdaptiveBeta()
    with pytest.raises(ValueError, match="gradient_factor"):
        adaptive.update(factor)
    assert adaptive.state_dict() == AdaptiveBeta().state_dict()


@pytest.mark.parametrize(
    ("state", "message"),
    [({}, "beta and factor"), ({"beta": 5000.0}, "beta and factor"), ({"beta": 1.0, "factor": 0.3}, "outside")],
)
def test_a_bad_state_is_refused_with_a_word(state, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveBeta().load_state_dict(state)

"""Oracles of MaPO: both variants, their values, slopes and limits, finite from error 0 to 1e4."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives import mapo_loss
from diffalign.objectives.mapo import SERIES_BELOW, VARIANTS, log_phi


def errors(*rows: tuple[float, float], dtype: torch.dtype = torch.float64, grad: bool = False) -> torch.Tensor:
    return torch.tensor(rows, dtype=dtype, requires_grad=grad)


def slopes(row: tuple[float, float], dtype: torch.dtype = torch.float64, **options: object) -> list[float]:
    policy = errors(row, dtype=dtype, grad=True)
    mapo_loss(policy, **options).loss.sum().backward()
    return policy.grad[0].tolist()


PHI = [(0.1, 0.950833), (0.25, 0.880203), (0.5, 0.770747), (1, 0.581977), (2, 0.313035), (5, 0.033918)]


@pytest.mark.parametrize(("u", "value"), [(0, 1), (1e-8, 1), *PHI])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_phi(u, value, dtype):
    assert log_phi(torch.tensor(u, dtype=dtype)).exp().item() == pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_log_phi_is_exact_on_both_sides_of_the_series_edge(dtype, tolerance):
    u = torch.tensor([1e-6, 1e-3, 0.05, SERIES_BELOW * 0.9999, SERIES_BELOW, 0.2, 1, 10, 80, 1e4], dtype=dtype)
    u.requires_grad_()
    value = log_phi(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        exact = [mpmath.log(x / mpmath.expm1(x)) for x in map(mpmath.mpf, u.tolist())]
        exact_slope = [1 / x - 1 / -mpmath.expm1(-x) for x in map(mpmath.mpf, u.tolist())]
    assert value.tolist() == pytest.approx([float(x) for x in exact], rel=tolerance)
    assert slope.tolist() == pytest.approx([float(x) for x in exact_slope], rel=tolerance)


@pytest.mark.parametrize("error", [0.0, 0.1, 3.0])
def test_equal_errors_give_the_error_and_a_tenth_of_ln2(error):
    out = mapo_loss(errors((error, error)))
    assert out.loss.item() == pytest.approx(error + 0.0693147, abs=5e-8)
    assert out.stats["rewards/accuracies"].item() == 0.5
    assert out.stats["gradient_factor"].item() == 0.5
    assert out.stats["loss/margin"].item() == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize(("error", "slope"), [(0.05, 13.3958), (0.1, 13.2917), (0.3, 12.8755), (0.0, 13.5)])
def test_slopes_at_equal_errors_sum_to_one(error, slope):
    winner, loser = slopes((error, error))
    assert winner == pytest.approx(slope, abs=5e-5)
    assert winner + loser == pytest.approx(1, rel=1e-12)


VALUES = [
    ((0.1, 0.101), 0.245813, 0.157777),
    ((0.101, 0.1), -0.245813, 0.183359),
    ((0.1, 0.12), 4.908343, 0.100736),
    ((0.12, 0.1), -4.908343, 0.611570),
    ((0.05, 0.5), 107.35, 0.05),
    ((0.5, 0.05), -107.35, 11.234917),
]


@pytest.mark.parametrize(("row", "logit", "loss"), VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hand_computed_values(row, logit, loss, dtype):
    out = mapo_loss(errors(row, dtype=dtype))
    margin = out.stats["rewards/margins"]
    assert margin.item() == pytest.approx(logit, rel=5e-5)
    assert out.loss.item() == pytest.approx(loss, abs=3e-6)
    assert torch.equal(margin, out.stats["rewards/chosen"] - out.stats["rewards/rejected"])
    assert out.stats["rewards/accuracies"].item() == (logit > 0)


def test_a_weight_of_zero_is_fine_tuning_on_the_winner():
    policy = errors((0.2, 0.1), grad=True)
    loss = mapo_loss(policy, beta=0.0).loss
    loss.sum().backward()
    assert torch.equal(loss, policy[:, 0])
    assert policy.grad[0].tolist() == [1, 0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("winner", [0.0, 1e-30, 1e-8, 0.1, 88.8, 200.0, 1e4])
@pytest.mark.parametrize("loser", [0.0, 1e-8, 0.1, 200.0, 1e4])
def test_value_and_gradient_are_finite_from_0_to_1e4(variant, dtype, winner, loser):
    policy = errors((winner, loser), dtype=dtype, grad=True)
    loss = mapo_loss(policy, variant=variant).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()


OPTIONS = [{}, {"beta": 1.0}, {"kappa": 2.0}, {"scale": 100.0}]
OPTIONS += [{"variant": "paper", "exponent": 1.0}, {"variant": "paper"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("row", [(0.1, 0.1), (0.1, 0.11), (0.11, 0.1), (0.0, 0.02), (0.02, 0.0)])
def test_winner_error_up_raises_and_loser_error_up_lowers(options, row):
    winner, loser = slopes(row, **options)
    assert winner > 1 or (winner == pytest.approx(1, abs=1e-2) and loser > -1e-2)  # more than fine-tuning alone
    assert loser < 0


def test_paper_scores_and_slopes():
    row = (0.5, 1.0)
    stats = mapo_loss(errors(row), variant="paper", exponent=1.0).stats
    assert stats["rewards/chosen"].item() + 1 == pytest.approx(0.770747, abs=1e-6)  # phi with kappa = 1
    assert stats["rewards/rejected"].item() + 1 == pytest.approx(0.581977, abs=1e-6)
    for exponent in (1.0, 2.0, 128.0):
        out = mapo_loss(errors(row), variant="paper", exponent=exponent)
        phi = [(x / math.expm1(x)) ** exponent for x in row]
        margin = phi[0] - phi[1]
        assert out.loss.item() == pytest.approx(0.5 + math.log1p(math.exp(-margin)) / exponent, rel=1e-12)
        at_zero = mapo_loss(errors((0.0, 0.0)), variant="paper", exponent=exponent)
        assert at_zero.stats["rewards/chosen"].item() == 0  # a score of 1, the maximum
        winner, loser = slopes((0.0, 0.0), variant="paper", exponent=exponent)
        assert (winner, loser) == pytest.approx((1.25, -0.25))  # d log score = -exponent / 2, the weight cancels it
    u = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    log_phi(u).exp().backward()
    assert u.grad.item() == pytest.approx(-0.3387, abs=5e-5)  # the true slope, not the paper's 0.2432


def test_the_paper_variants_margin_slope_is_bounded():
    grid = torch.cartesian_prod(*2 * [torch.linspace(0, 5, 101, dtype=torch.float64)])
    for exponent in (1.0, 8.0, 128.0):
        policy = grid.clone().requires_grad_()
        mapo_loss(policy, variant="paper", exponent=exponent).loss.sum().backward()
        slope = policy.grad - torch.tensor([1.0, 0.0])
        assert slope.abs().max() < 0.37
        assert slope[:, 0].min() >= 0 >= slope[:, 1].max()


def test_variants_differ_and_pairs_do_not_mix():
    policy = torch.rand(5, 2, dtype=torch.float64)
    code, paper = (mapo_loss(policy, variant=v).loss for v in VARIANTS)
    assert not torch.allclose(code, paper)
    assert torch.equal(code[3:4], mapo_loss(policy[3:4]).loss)
    assert torch.equal(code, mapo_loss(policy, variant="code", beta=0.1, kappa=0.5, scale=1000.0).loss)
    assert torch.equal(paper, mapo_loss(policy, variant="paper", exponent=128.0).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "papr"}, "code, paper"),
        ({"variant": "paper", "beta": 0.1}, "beta=0.1 would have no effect.*exponent"),
        ({"variant": "paper", "kappa": 0.5}, "kappa.*no effect"),
        ({"variant": "paper", "scale": 1000.0}, "scale.*no effect"),
        ({"exponent": 128.0}, "exponent.*no effect"),
        ({"beta": -0.1}, "beta must be"),
        ({"beta": math.nan}, "beta must be"),
        ({"kappa": 0.0}, "kappa must be"),
        ({"scale": -1.0}, "scale must be"),
        ({"variant": "paper", "exponent": 0.0}, "exponent must be"),
        ({"policy_error": torch.rand(2, 3)}, r"\(B, 2\)"),
        ({"policy_error": torch.rand(2, 2).half()}, "float32 or float64"),
    ],
)
def test_bad_input_is_refused_with_a_word(options, message):
    with pytest.raises(ValueError, match=message):
        mapo_loss(**({"policy_error": torch.rand(2, 2)} | options))

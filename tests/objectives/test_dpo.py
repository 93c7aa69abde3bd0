"""Oracles of Diffusion-DPO: hand-computed values, signs, symmetries and limits."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives import dpo_loss
from diffalign.objectives.dpo import LOSS_TYPES, SMOOTHINGS

BETA = 5000.0


def errors(*rows: tuple[float, float], grad: bool = False) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64, requires_grad=grad)


def gap(d: float, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors whose preference error (winner minus loser, against the reference) is d."""
    return errors((0.1 + d, 0.1), grad=grad), errors((0.1, 0.1))


@pytest.mark.parametrize("beta", [1.0, 2000.0, 5000.0])
def test_policy_equal_to_reference_gives_ln2_but_a_gradient(beta):
    policy = errors((0.1, 0.3), grad=True)
    out = dpo_loss(policy, policy.detach(), beta=beta)
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert policy.grad[0].tolist() == pytest.approx([beta / 4, -beta / 4])
    assert out.stats["rewards/accuracies"].item() == 0.5
    assert out.stats["gradient_factor"].item() == 0.5
    assert out.stats["rewards/chosen"].item() == out.stats["rewards/rejected"].item() == 0


@pytest.mark.parametrize(("d", "value"), [(-4e-4, 0.313262), (4e-4, 1.313262), (1e-4, 0.825939), (1e-3, 2.578890)])
def test_hand_computed_values(d, value):
    assert dpo_loss(*gap(d), beta=BETA).loss.item() == pytest.approx(value, rel=2e-6)


@pytest.mark.parametrize(("d", "slope"), [(4e-4, 1827.646), (-4e-4, 672.354)])
def test_hand_computed_gradients(d, slope):
    policy, reference = gap(d, grad=True)
    dpo_loss(policy, reference, beta=BETA).loss.sum().backward()
    assert policy.grad[0].tolist() == pytest.approx([slope, -slope], rel=1e-6)


def test_swapping_the_pair_flips_the_margin():
    policy, reference = errors((0.12, 0.1)), errors((0.11, 0.105))
    out, swapped = dpo_loss(policy, reference, beta=BETA), dpo_loss(policy.flip(1), reference.flip(1), beta=BETA)
    margin = out.stats["rewards/margins"]
    assert torch.equal(swapped.stats["rewards/margins"], -margin)
    assert (out.loss - swapped.loss).item() == pytest.approx(-margin.item(), rel=1e-12)


def test_only_the_change_against_the_reference_counts():
    policy, reference = errors((0.12, 0.1)), errors((0.11, 0.105))
    base = dpo_loss(policy, reference, beta=BETA).loss
    for shift in (torch.tensor([[0.3, 0.0]]), torch.tensor([[0.3, 0.3]])):
        assert torch.allclose(dpo_loss(policy + shift, reference + shift, beta=BETA).loss, base, rtol=1e-9)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("d", [-3e-4, 0.0, 3e-4])
def test_winner_error_up_raises_and_loser_error_up_lowers(loss_type, d):
    policy, reference = gap(d, grad=True)
    dpo_loss(policy, reference, beta=1000.0, loss_type=loss_type).loss.sum().backward()
    winner, loser = policy.grad[0].tolist()
    assert winner > 0
    assert loser < 0


def test_a_batch_is_the_mean_of_its_pairs_and_pairs_do_not_mix():
    policy = (torch.rand(4, 2, dtype=torch.float64) * 1e-3 + 0.1).requires_grad_()
    reference = torch.rand(4, 2, dtype=torch.float64) * 1e-3 + 0.1
    batch = dpo_loss(policy, reference, beta=BETA).loss
    singles = torch.cat([dpo_loss(policy[i : i + 1], reference[i : i + 1], beta=BETA).loss for i in range(4)])
    assert torch.equal(batch, singles)
    (gradient,) = torch.autograd.grad(batch[2], policy)
    assert gradient[[0, 1, 3]].abs().sum() == 0
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(dpo_loss(policy[order], reference[order], beta=BETA).loss, batch[order])


@pytest.mark.parametrize(("n", "coefficient"), [(16384, 0.15258789), (65536, 0.03814697)])
def test_mean_and_half_equal_the_sum_convention(n, coefficient):
    squares = torch.rand(2, n, dtype=torch.float64), torch.rand(2, n, dtype=torch.float64)
    policy, reference = (s.mean(1)[None] * 1e-2 for s in squares)
    summed = [s.sum(1) * 1e-2 for s in squares]
    logit = -coefficient * ((summed[0][0] - summed[0][1]) - (summed[1][0] - summed[1][1]))
    margin = dpo_loss(policy, reference, beta=BETA).stats["rewards/margins"]
    assert margin.item() == pytest.approx(logit.item(), rel=1e-6)


def test_without_the_half_beta_2500_is_our_5000():
    policy, reference = errors((0.12, 0.1)), errors((0.11, 0.105))
    other = -torch.nn.functional.logsigmoid(
        2500 * ((reference[:, 0] - reference[:, 1]) - (policy[:, 0] - policy[:, 1]))
    )
    assert torch.allclose(dpo_loss(policy, reference, beta=5000.0).loss, other, rtol=1e-9)


def test_fp32_errors_keep_the_logit_where_fp16_loses_it():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 16384, generator=generator, dtype=torch.float64)
    noise = 0.3 * torch.randn(4, 16384, generator=generator, dtype=torch.float64)
    drift = 0.01 * torch.randn(4, 16384, generator=generator, dtype=torch.float64)  # between policy and reference

    def logit(dtype: torch.dtype) -> float:
        predicted = (target + noise).to(dtype)
        reference = (target + noise + drift).to(dtype)
        square = [(p - target.to(dtype)).square().mean(1).double() for p in (predicted, reference)]
        change = square[0] - square[1]
        return (-0.5 * BETA * (change[0] - change[1])).item()

    assert abs(logit(torch.float32) - logit(torch.float64)) < 1e-2
    assert abs(logit(torch.float16) - logit(torch.float64)) > 1e-2
    half = torch.full((1, 2), 0.1, dtype=torch.float16)
    with pytest.raises(ValueError, match="float32 or float64"):
        dpo_loss(half, half, beta=BETA)


def test_a_tie_kept_soft_has_no_pull_at_the_reference_and_pulls_back_elsewhere():
    policy = errors((0.1, 0.1), grad=True)
    half = torch.tensor([0.5], dtype=torch.float64)
    dpo_loss(policy, policy.detach(), beta=BETA, probability=half).loss.sum().backward()
    assert policy.grad.abs().max() == 0
    policy, reference = gap(-1e-4, grad=True)
    dpo_loss(policy, reference, beta=BETA, probability=half).loss.sum().backward()
    assert policy.grad[0, 0] < 0 < policy.grad[0, 1]


def test_probability_one_is_the_hard_label_bit_for_bit_and_zero_the_swapped_pair():
    policy, reference = errors((0.12, 0.1)), errors((0.11, 0.105))
    hard = dpo_loss(policy, reference, beta=BETA).loss
    assert torch.equal(dpo_loss(policy, reference, beta=BETA, probability=torch.ones(1)).loss, hard)
    swapped = dpo_loss(policy.flip(1), reference.flip(1), beta=BETA).loss
    assert torch.equal(dpo_loss(policy, reference, beta=BETA, probability=torch.zeros(1)).loss, swapped)


def test_ipo_has_its_minimum_at_margin_one_half():
    policy, reference = gap(-0.5 / (0.5 * BETA), grad=True)
    out = dpo_loss(policy, reference, beta=BETA, loss_type="ipo")
    out.loss.sum().backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-20)
    assert policy.grad.abs().max() < 1e-6


# --- labels that may be wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_smoothing_is_plain_dpo_bit_for_bit(smoothing, loss_type):
    policy, reference = errors((0.12, 0.1), (0.1, 0.2)), errors((0.11, 0.105), (0.1, 0.1))
    plain = dpo_loss(policy, reference, loss_type=loss_type).loss
    assert torch.equal(dpo_loss(policy, reference, loss_type=loss_type, smoothing=smoothing).loss, plain)
    soft = torch.tensor([0.3, 0.8], dtype=torch.float64)
    options = {"loss_type": loss_type, "probability": soft}
    assert torch.equal(
        dpo_loss(policy, reference, smoothing=smoothing, **options).loss, dpo_loss(policy, reference, **options).loss
    )


@pytest.mark.parametrize("d", [-1e-3, 0.0, 4e-4])
def test_smoothed_values(d):
    logit, eps = -0.5 * BETA * d, 0.1
    right, wrong = math.log1p(math.exp(-logit)), math.log1p(math.exp(logit))
    policy, reference = gap(d)
    cdpo = dpo_loss(policy, reference, label_smoothing=eps)
    assert cdpo.loss.item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-9)
    rdpo = dpo_loss(policy, reference, label_smoothing=eps, smoothing="robust")
    assert rdpo.loss.item() == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8, rel=1e-9)
    assert rdpo.stats.keys() == cdpo.stats.keys()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_robust_smoothing_is_unbiased_under_flipped_labels(loss_type):
    policy, reference, eps = errors((0.1203, 0.12)), errors((0.12, 0.1199)), 0.3
    options = {"beta": 4000.0, "loss_type": loss_type}
    robust = options | {"label_smoothing": eps, "smoothing": "robust"}
    kept, flipped = dpo_loss(policy, reference, **robust), dpo_loss(policy.flip(1), reference.flip(1), **robust)
    mean = (1 - eps) * kept.loss + eps * flipped.loss
    assert mean.item() == pytest.approx(dpo_loss(policy, reference, **options).loss.item(), rel=1e-9)


def test_conservative_smoothing_is_the_mean_over_flipped_labels_and_stops_at_its_margin():
    policy, reference, eps = errors((0.1203, 0.12)), errors((0.12, 0.1199)), 0.3
    mean = 0.7 * dpo_loss(policy, reference).loss + 0.3 * dpo_loss(policy.flip(1), reference.flip(1)).loss
    smoothed = dpo_loss(policy, reference, label_smoothing=eps).loss
    assert smoothed.item() == pytest.approx(mean.item(), rel=1e-12)
    for extra, sign in ((-1e-5, 1), (0.0, 0), (1e-5, -1)):  # before, at and beyond log((1 - eps) / eps)
        policy, reference = gap(-(math.log(0.7 / 0.3) / (0.5 * BETA)) - extra, grad=True)
        dpo_loss(policy, reference, label_smoothing=eps).loss.sum().backward()
        winner = policy.grad[0, 0].item()
        assert winner == pytest.approx(0, abs=1e-8) if sign == 0 else winner * sign > 0


@pytest.mark.parametrize(("smoothing", "share"), [("conservative", 0.66), ("robust", 0.75)])
def test_smoothing_of_a_label_that_is_soft_already(smoothing, share):
    policy, reference = errors((0.1203, 0.12)), errors((0.12, 0.1199))
    p = torch.tensor([0.7], dtype=torch.float64)
    smoothed = dpo_loss(policy, reference, probability=p, label_smoothing=0.1, smoothing=smoothing).loss
    same = dpo_loss(policy, reference, probability=torch.full_like(p, share)).loss
    assert smoothed.item() == pytest.approx(same.item(), rel=1e-12)


@pytest.mark.parametrize("d", [-2e-2, -3e-4, 0.0, 3e-4])
def test_robust_smoothing_always_pulls_the_right_way(d):
    policy, reference = gap(d, grad=True)
    dpo_loss(policy, reference, label_smoothing=0.2, smoothing="robust").loss.sum().backward()
    winner, loser = policy.grad[0].tolist()
    assert winner >= 0.5 * BETA * 0.2 / 0.6 * (1 - 1e-9)  # the floor eps / (1 - 2 eps), which never saturates
    assert loser == pytest.approx(-winner, rel=1e-12)


@pytest.mark.parametrize("d", [-3e-4, 0.0, 3e-4])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_smoothed_losses_keep_the_direction_before_their_margin(d, loss_type, smoothing):
    policy, reference = gap(d, grad=True)
    dpo_loss(
        policy, reference, beta=1000.0, loss_type=loss_type, label_smoothing=0.1, smoothing=smoothing
    ).loss.sum().backward()
    winner, loser = policy.grad[0].tolist()
    assert winner > 0 > loser


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_finite_at_extreme_errors(loss_type):
    policy = torch.tensor([[0.0, 1e4], [1e4, 0.0], [0.0, 0.0]], requires_grad=True)
    loss = dpo_loss(policy, torch.zeros(3, 2), loss_type=loss_type, label_smoothing=0.1).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_error": torch.rand(3, 3)}, r"shape \(B, 2\)"),
        ({"reference_error": torch.rand(2, 2)}, "shape of policy_error"),
        ({"loss_type": "sigmiod"}, "sigmoid, hinge, ipo"),
        ({"probability": torch.tensor([0.5, 1.5, 0.1])}, r"\[0, 1\]; probability\[1\] is 1.5"),
        ({"probability": torch.tensor([0.5, 0.5, math.nan])}, r"probability\[2\] is nan"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"\[0, 0.5\)"),
        ({"label_smoothing": math.nan}, r"\[0, 0.5\)"),
        ({"label_smoothing": 0.1, "smoothing": "rdpo"}, "conservative, robust"),
        ({"beta": 0.0}, "beta must be"),
        ({"beta": math.inf}, "beta must be"),
        ({"probability": torch.tensor([0.5])}, "shape"),
    ],
)
def test_bad_input_is_refused_with_a_word(change, message):
    arguments = {"policy_error": torch.rand(3, 2), "reference_error": torch.rand(3, 2)} | change
    with pytest.raises(ValueError, match=message):
        dpo_loss(**arguments)

"""Oracles of SmPO: DPO's limit bit for bit, zero gradient at 1/2, the weight table, labels that contradict scores."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.objectives import dpo_loss, smpo_loss, soft_probability
from diffalign.trainers import SmPOConfig

WIDTH = 0.28201571106910706 - 0.11543526500463486  # PickScore's range in the authors' data


def pairs(count: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    draw = [0.1 + 1e-3 * torch.rand(count, 2, generator=generator, dtype=dtype) for _ in range(2)]
    return draw[0].requires_grad_(), draw[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_probability_one_half_has_ln2_and_exactly_no_gradient(dtype, gamma):
    policy, reference = pairs(4, dtype)
    loss = smpo_loss(policy, reference, torch.full((4,), 0.5), gamma=gamma).loss
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2)] * 4)
    assert policy.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probability_one_and_gamma_one_is_dpo_bit_for_bit(dtype):
    policy, reference = pairs(64, dtype)
    dpo = dpo_loss(policy, reference, beta=3000.0)
    (expected,) = torch.autograd.grad(dpo.loss.sum(), policy)
    smpo = smpo_loss(policy, reference, torch.ones(64), beta=3000.0, gamma=1.0)
    (gradient,) = torch.autograd.grad(smpo.loss.sum(), policy)
    assert torch.equal(smpo.loss, dpo.loss)
    assert torch.equal(gradient, expected)
    assert all(torch.equal(smpo.stats[name], value) for name, value in dpo.stats.items())


def test_below_one_half_the_pair_is_swapped():
    policy, reference = pairs(6)
    p = torch.tensor([0.0, 0.1, 0.3, 0.45, 0.5, 0.9], dtype=torch.float64)
    loss = smpo_loss(policy, reference, p).loss
    assert torch.allclose(loss, smpo_loss(policy.flip(1), reference.flip(1), 1 - p).loss, rtol=1e-12)


@pytest.mark.parametrize(("p", "sign"), [(0.51, 1), (1.0, 1), (0.49, -1), (0.0, -1)])
@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_winner_error_up_raises_and_loser_error_up_lowers_as_the_scores_say(p, sign, gamma):
    policy, reference = pairs(8)
    smpo_loss(policy, reference, torch.full((8,), p), beta=1000.0, gamma=gamma).loss.sum().backward()
    assert (sign * policy.grad[:, 0] > 0).all()
    assert (sign * policy.grad[:, 1] < 0).all()


@pytest.mark.parametrize(
    ("difference", "weight"),
    [
        (0.0, 0.0),
        (0.001, 0.030015),
        (0.005, 0.150066),
        (0.01, 0.300065),
        (0.02, 0.599590),
        (0.05, 1.489610),
        (WIDTH, 4.621172),
        (-0.01, -0.300065),
    ],
)
def test_weight_table(difference, weight):
    p = soft_probability(torch.tensor([difference], dtype=torch.float64), WIDTH, contradiction="follow_scores")
    policy, reference = pairs(1)
    out = smpo_loss(policy, reference, p, gamma=10.0)
    assert out.stats["weights/pair"].item() == pytest.approx(weight, abs=6e-7)
    assert out.stats["weights/pair"].item() == pytest.approx(10 * math.tanh(difference / (2 * WIDTH)), abs=1e-12)
    scaled = dpo_loss(policy, reference, beta=5000.0 * max(weight, 1e-9)).loss  # the weight scales beta
    if weight > 0:
        assert out.loss.item() == pytest.approx(scaled.item(), rel=1e-5)


def test_each_pair_has_its_own_weight_and_pairs_do_not_mix():
    policy, reference = pairs(5)
    p = torch.tensor([0.5, 0.6, 0.7, 0.9, 1.0], dtype=torch.float64)
    loss = smpo_loss(policy, reference, p).loss
    singles = [smpo_loss(policy[i : i + 1], reference[i : i + 1], p[i : i + 1]).loss for i in range(5)]
    assert torch.equal(loss, torch.cat(singles))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert torch.equal(smpo_loss(policy[order], reference[order], p[order]).loss, loss[order])


def test_no_gradient_reaches_reference_or_probability():
    policy, reference = pairs(2)
    p = torch.tensor([0.6, 0.7], dtype=torch.float64)
    out = smpo_loss(policy, reference, p)
    assert not any(value.requires_grad for value in out.stats.values())
    out.loss.sum().backward()
    assert reference.grad is None


@given(st.floats(-5, 5), st.floats(0.01, 100), st.floats(-10, 10), st.floats(0.1, 50))
def test_scores_may_be_shifted_and_scaled_together(difference, width, shift, scale):
    winner = torch.tensor([shift + difference * width], dtype=torch.float64)
    loser = torch.tensor([shift], dtype=torch.float64)
    follow = partial(soft_probability, contradiction="follow_scores")
    p = follow(winner - loser, width)
    moved = follow((winner + 3) * scale - (loser + 3) * scale, width * scale)
    assert moved.item() == pytest.approx(p.item(), abs=1e-9)
    assert follow(loser - winner, width).item() == pytest.approx(1 - p.item(), abs=1e-12)


def test_scores_that_contradict_the_label():
    difference = torch.tensor([0.02, 0.0, -0.02], dtype=torch.float64)
    followed = soft_probability(difference, WIDTH, contradiction="follow_scores")
    assert followed[0] > 0.5 == followed[1] > followed[2]
    undecided = soft_probability(difference, WIDTH)  # the default, as of the trainer and of `soften`
    assert undecided.tolist() == [followed[0].item(), 0.5, 0.5]
    assert SmPOConfig().contradiction == "undecided"


def test_finite_at_extreme_errors():
    policy = torch.tensor([[0.0, 1e4], [1e4, 0.0]], requires_grad=True)
    loss = smpo_loss(policy, torch.zeros(2, 2), torch.ones(2)).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probability": torch.tensor([0.5, 1.0, 1.01])}, r"probability\[2\] is 1.0099"),
        ({"probability": torch.tensor([0.5, math.nan, 0.5])}, r"probability\[1\] is nan"),
        ({"probability": torch.tensor([-0.1, 0.5, 0.5])}, r"probability\[0\]"),
        ({"probability": torch.ones(2)}, "shape"),
        ({"gamma": 0.0}, "gamma must be"),
        ({"beta": -1.0}, "beta must be"),
        ({"policy_error": torch.rand(3, 2).half()}, "float32 or float64"),
        ({"policy_error": torch.rand(3, 3)}, r"\(B, 2\)"),
    ],
)
def test_bad_input_is_refused_with_a_word(change, message):
    arguments = {
        "policy_error": torch.rand(3, 2),
        "reference_error": torch.rand(3, 2),
        "probability": torch.full((3,), 0.8),
    }
    with pytest.raises(ValueError, match=message):
        smpo_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1), 0.0), "score_range"),
        ((torch.zeros(1), -1.0), "score_range"),
        ((torch.zeros(1), math.nan), "score_range"),
        ((torch.tensor([0.0, math.nan]), 1.0), r"score_difference\[1\] is nan"),
        ((torch.tensor([math.inf]), 1.0), r"score_difference\[0\] is inf"),
    ],
)
def test_bad_scores_are_refused_with_a_word(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_probability(*arguments)
    with pytest.raises(ValueError, match="follow_scores, undecided.*soften"):
        soft_probability(torch.zeros(1), 1.0, contradiction="drop")

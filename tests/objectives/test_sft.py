from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives import LossOutput, dpo_loss, mapo_loss, rankdpo_loss, sft_loss, with_sft


def test_only_the_winner_counts():
    policy = torch.rand(3, 4, requires_grad=True)
    out = sft_loss(policy)
    out.loss.sum().backward()
    assert torch.equal(out.loss, policy[:, 0])
    assert torch.equal(policy.grad, torch.tensor([1.0, 0, 0, 0]).expand(3, 4))
    assert torch.equal(out.stats["error/loser"], policy[:, -1].detach())


def test_the_anchor_adds_the_winners_error_and_its_slope():
    policy, reference = torch.rand(3, 2, dtype=torch.float64, requires_grad=True), torch.rand(3, 2, dtype=torch.float64)
    plain = dpo_loss(policy, reference, beta=20.0)
    out = with_sft(plain, policy, 3.0)
    assert torch.equal(out.loss, plain.loss + 3 * policy[:, 0])
    (before,), (after,) = (torch.autograd.grad(o.loss.sum(), policy, retain_graph=True) for o in (plain, out))
    assert torch.allclose(after - before, torch.tensor([3.0, 0.0], dtype=torch.float64).expand(3, 2))
    assert torch.equal(out.stats["loss/sft"] + out.stats["loss/preference"], out.loss.detach())
    assert plain.stats.items() <= {**out.stats}.items()
    assert "loss/sft" not in plain.stats  # the objective's own output is left alone


def test_a_weight_of_zero_changes_nothing():
    policy = torch.rand(3, 2)
    plain = mapo_loss(policy)
    assert torch.equal(with_sft(plain, policy, 0.0).loss, plain.loss)


def test_the_winner_of_a_list_is_the_preferred_image_wherever_it_stands():
    policy, reference = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3)
    preference = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 1.0]])
    plain = rankdpo_loss(policy, reference, preference)
    out = with_sft(plain, policy, 2.0, preference=preference)
    (slope,) = torch.autograd.grad((out.loss - plain.loss).sum(), policy)
    assert torch.allclose(slope, torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.0, 1.0]]))


def test_the_winner_of_a_pair_is_what_its_probability_says_and_nobody_at_one_half():
    policy = torch.rand(3, 2, requires_grad=True)
    plain = LossOutput(torch.zeros(3))
    out = with_sft(plain, policy, 2.0, probability=torch.tensor([0.51, 0.5, 0.2]))
    (slope,) = torch.autograd.grad(out.loss.sum(), policy)
    assert torch.equal(slope, torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))


def test_the_anchor_stops_displacement():
    """Both errors rise together: the preference loss is content, the sum is not."""
    low, high = torch.tensor([[0.1, 0.2]]), torch.tensor([[0.5, 0.6]])
    reference = torch.tensor([[0.1, 0.1]])
    assert torch.allclose(dpo_loss(low, reference).loss, dpo_loss(high, reference).loss)
    anchored = [with_sft(dpo_loss(error, reference), error, 100.0).loss for error in (low, high)]
    assert (anchored[1] - anchored[0]).item() == pytest.approx(40, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1.0}, "weight must be"),
        ({"weight": math.nan}, "weight must be"),
        ({"policy_error": torch.rand(2, 2)}, "2 rows but the loss has shape"),
        ({"preference": torch.tensor([[0.0, 2.0]]).expand(3, 2)}, r"preference\[0, 1\]"),
        ({"probability": torch.tensor([0.5, math.nan, 1.0])}, r"probability\[1\]"),
        ({"probability": torch.ones(2)}, "probability must have shape"),
        ({"probability": torch.ones(3), "policy_error": torch.rand(3, 4)}, r"shape \(B, 2\)"),
        ({"probability": torch.ones(3), "preference": torch.rand(3, 2)}, "pass one of them"),
    ],
)
def test_bad_input_is_refused_with_a_word(change, message):
    arguments = {"out": LossOutput(torch.rand(3)), "policy_error": torch.rand(3, 2), "weight": 1.0} | change
    with pytest.raises(ValueError, match=message):
        with_sft(arguments.pop("out"), arguments.pop("policy_error"), arguments.pop("weight"), **arguments)

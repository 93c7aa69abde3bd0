"""Group advantages: closed forms, and the guards that keep nothing from becoming something."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.objectives.advantages import check_groups, combined_advantages, group_advantages, ranking_std


def one_group(values, **options):
    values = torch.as_tensor(values, dtype=torch.float64)
    return group_advantages(values, torch.zeros(len(values), dtype=torch.int64), **options)


def test_a_strict_ranking_of_four():
    rewards = [0, 1 / 3, 2 / 3, 1]
    assert one_group(rewards).tolist() == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408], abs=1e-7)
    assert one_group(rewards, scale="fixed").tolist() == pytest.approx(one_group(rewards).tolist(), abs=1e-9)
    assert one_group(rewards, scale="none").tolist() == pytest.approx([-0.5, -1 / 6, 1 / 6, 0.5])


@pytest.mark.parametrize(("size", "std"), [(2, 0.5), (8, 0.327327), (9, 0.322749), (16, 0.307318), (24, 0.300965)])
def test_any_strict_ranking(size, std):
    assert ranking_std(size) == pytest.approx(std, abs=1e-6)
    advantages = one_group([i / (size - 1) for i in range(size)])
    assert advantages.max().item() == pytest.approx(math.sqrt(3 * (size - 1) / (size + 1)))
    assert advantages.sum().item() == pytest.approx(0, abs=1e-9)
    assert advantages.square().mean().item() == pytest.approx(1, abs=1e-9)


def test_units_do_not_matter():
    rewards = torch.rand(8, dtype=torch.float64)
    assert torch.allclose(one_group(rewards), one_group(7 * rewards - 3))


def test_the_group_scale_makes_one_pair_loud_and_the_fixed_scale_does_not():
    rewards = [0.5] * 6 + [0.5 + 0.5 / 7, 0.5 - 0.5 / 7]
    assert one_group(rewards)[6].item() == pytest.approx(2.0, abs=1e-9)
    assert one_group(rewards, scale="fixed")[6].item() == pytest.approx(0.2182, abs=1e-4)


@pytest.mark.parametrize("size", [8, 12, 16, 24])
@pytest.mark.parametrize("value", [3.3, 0.571, 21.7, 4.7])
def test_a_constant_group_has_no_advantage(size, value):
    assert torch.equal(one_group(torch.full((size,), value)), torch.zeros(size, dtype=torch.float64))


def test_why_the_guard_exists():
    """The arithmetic that it replaces: a running fp32 mean and a tiny epsilon turn equal rewards into advantages."""
    total = torch.tensor(0.0)
    for _ in range(12):
        total = total + torch.tensor(3.3)
    centred = torch.full((12,), 3.3) - total / 12
    assert float((centred / (centred.square().mean().sqrt() + 1e-8)).abs().max()) > 0.5


def test_missing_rewards_have_no_advantage_and_no_say():
    nan = float("nan")
    with_gap = one_group([0.0, nan, 1.0, 0.5])
    assert with_gap[1] == 0
    assert torch.allclose(with_gap[[0, 2, 3]], one_group([0.0, 1.0, 0.5]))
    for lonely in ([nan, 3.0, nan], [2.0], [nan, nan]):
        assert torch.equal(one_group(lonely), torch.zeros(len(lonely), dtype=torch.float64))


def test_groups_do_not_mix_and_order_does_not_matter():
    groups = torch.arange(24) % 3
    rewards = torch.rand(24, dtype=torch.float64) + 100 * groups
    order = torch.randperm(24)
    together = group_advantages(rewards, groups)
    assert torch.allclose(together[order], group_advantages(rewards[order], groups[order]))
    assert torch.allclose(together[groups == 1], one_group(rewards[groups == 1]))


def test_the_fixed_scale_is_that_of_the_groups_own_rewards():
    """Neither the pictures of other groups nor a missing reward change it."""
    rewards = torch.tensor([0, 1 / 3, 2 / 3, 1, 0, 0.5, 1, float("nan")], dtype=torch.float64)
    both = group_advantages(rewards, torch.tensor([0] * 4 + [1] * 4), scale="fixed")
    assert both[:4].tolist() == pytest.approx(one_group([0, 1 / 3, 2 / 3, 1], scale="fixed").tolist())
    assert both[4:].tolist() == pytest.approx([*one_group([0, 0.5, 1], scale="fixed").tolist(), 0.0])


def test_rewards_are_normalised_before_they_are_added():
    first, second = torch.tensor([0.0, 1, 2, 3]), torch.tensor([0.0, 100, 0, 0])
    groups, weights = torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 1.0])
    sum_of_both = combined_advantages(torch.stack([first, second], 1), groups, weights)
    louder = combined_advantages(torch.stack([first, 10 * second], 1), groups, weights)
    assert torch.allclose(sum_of_both, louder)
    assert not torch.allclose(one_group(first + second), one_group(first + 10 * second))
    assert torch.allclose(sum_of_both, one_group(first) + one_group(second))


def test_clip_holds():
    values = [0.0] * 40 + [1.0]
    assert one_group(values).max().item() == 5.0
    assert one_group(values, clip=2.0).max().item() == 2.0


def test_bad_inputs():
    with pytest.raises(ValueError, match="int64"):
        group_advantages(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="scale"):
        one_group([0.0, 1.0], scale="batch")
    with pytest.raises(ValueError, match="group 3 has 1"):
        check_groups(torch.tensor([1, 1, 3]), 2)


def test_without_a_least_spread_equal_rewards_still_have_no_advantage():
    assert one_group([0.3, 0.3, 0.3], min_spread=0.0).tolist() == [0.0, 0.0, 0.0]
    assert one_group([0.3, 0.3 + 1e-9], min_spread=0.0).tolist() == pytest.approx([-1.0, 1.0])


def test_rewards_have_their_weights_and_the_sum_is_clipped_too():
    rewards = torch.stack([torch.tensor([0.0, 1, 2, 3]), torch.tensor([3.0, 1, 2, 0])], 1)
    groups = torch.zeros(4, dtype=torch.int64)
    first, second = one_group(rewards[:, 0]), one_group(rewards[:, 1])
    weighted = combined_advantages(rewards, groups, torch.tensor([2.0, 0.5]))
    assert torch.allclose(weighted, 2 * first + 0.5 * second)
    held = combined_advantages(rewards, groups, torch.tensor([2.0, 0.5]), clip=1.5)
    assert held.max() == 1.5 and held.min() == -1.5

"""Oracles of RankDPO: weights, DPO's limit, permutations, ties, lists with nothing to tell apart."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffalign.objectives import dpo_loss, pair_weights, rankdpo_loss
from diffalign.objectives.rankdpo import WEIGHTINGS

CLEAN = (1.0, 2 / 3, 1 / 3, 0.0)
DELTA = {(0, 1): 0.152278, (0, 2): 0.370039, (0, 3): 0.569323, (1, 2): 0.042877, (1, 3): 0.117629, (2, 3): 0.018019}


def preference(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def lists(count: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = [0.1 + 1e-3 * torch.rand(count, k, generator=generator, dtype=dtype) for _ in range(2)]
    return draw[0].requires_grad_(), draw[1]


def slopes(policy: torch.Tensor, *arguments: torch.Tensor, **options: object) -> torch.Tensor:
    return torch.autograd.grad(rankdpo_loss(policy, *arguments, **options).loss.sum(), policy)[0]


# --- weights -----------------------------------------------------------------------------------------------------


def test_weights_of_a_clean_order():
    delta = pair_weights(preference(CLEAN))[0]
    for (i, j), value in DELTA.items():
        assert delta[i, j].item() == pytest.approx(value, abs=1e-6)
    assert torch.equal(delta, delta.T)
    assert delta.diagonal().abs().max() == 0
    assert delta.triu().sum().item() == pytest.approx(1.270165, abs=1e-6)
    natural = pair_weights(preference(CLEAN), log_base=math.e)[0]
    assert natural.triu().sum().item() == pytest.approx(1.832461, abs=1e-6)
    assert torch.allclose(natural, delta / math.log(2), rtol=1e-12)


def test_tied_images_share_the_mean_discount_and_have_no_weight_between_them():
    delta = pair_weights(preference((1.0, 0.5, 0.5, 0.0)))[0]
    inverse = [1 / math.log2(1 + rank) for rank in (1, 2, 3, 4)]
    shared = (inverse[1] + inverse[2]) / 2
    gain = math.sqrt(2) - 1
    assert delta[1, 2] == 0
    assert delta[0, 1].item() == pytest.approx((1 - gain) * (1 - shared), rel=1e-12)
    assert torch.equal(delta[0, 1], delta[0, 2])
    assert delta[2, 3].item() == pytest.approx(gain * (shared - inverse[3]), rel=1e-12)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equal_preferences_have_no_weight(weighting):
    assert pair_weights(torch.full((2, 5), 0.4), weighting=weighting).abs().max() == 0


def test_gain_alone_and_none():
    phi = preference((0.0, 1.0, 0.5))
    gain = [2**x - 1 for x in phi[0].tolist()]
    by_gain, linear, flat = (
        pair_weights(phi, **options)[0]
        for options in ({"weighting": "gain"}, {"weighting": "gain", "gain": "linear"}, {"weighting": "none"})
    )
    for i, j in itertools.permutations(range(3), 2):
        assert by_gain[i, j].item() == pytest.approx(abs(gain[i] - gain[j]), rel=1e-12)
        assert linear[i, j].item() == pytest.approx(2 * abs(phi[0, i] - phi[0, j]).item(), rel=1e-12)
        assert flat[i, j] == 1
    assert flat.diagonal().sum() == 0


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(1.0, 0.0), (0.0, 1.0)])
def test_two_images_without_weights_are_dpo(order):
    policy, reference = lists(16, 2, torch.float32)
    ranked = rankdpo_loss(policy, reference, torch.tensor([order]).expand(16, 2), weighting="none")
    first = order[0] > order[1]
    arranged = (policy, reference) if first else (policy.flip(1), reference.flip(1))
    dpo = dpo_loss(*arranged)
    assert torch.equal(ranked.loss, dpo.loss)
    (expected,) = torch.autograd.grad(dpo.loss.sum(), policy)
    (gradient,) = torch.autograd.grad(ranked.loss.sum(), policy)
    assert torch.equal(gradient, expected)
    assert all(torch.equal(ranked.stats[name], value) for name, value in dpo.stats.items())


@pytest.mark.parametrize(
    ("phi", "base", "factor"),
    [
        ((1.0, 0.0), None, 0.369070),
        ((0.8, 0.2), None, 0.218638),
        ((1.0, 0.0), math.e, 0.532456),
        ((0.8, 0.2), math.e, 0.315428),
    ],
)
def test_two_images_are_dpo_times_a_constant(phi, base, factor):
    policy, reference = lists(3, 2)
    loss = rankdpo_loss(policy, reference, preference(phi).expand(3, 2), log_base=base).loss
    ratio = loss / dpo_loss(policy, reference).loss
    assert ratio.tolist() == pytest.approx([factor] * 3, abs=1e-6)


@pytest.mark.parametrize(("base", "value"), [(None, 0.880412), (math.e, 1.270165)])
def test_policy_equal_to_reference(base, value):
    policy, _ = lists(2, 4)
    out = rankdpo_loss(policy, policy.detach(), preference(CLEAN).expand(2, 4), log_base=base)
    assert out.loss.tolist() == pytest.approx([value] * 2, abs=1e-6)
    assert out.stats["rewards/accuracies"].tolist() == [0.5, 0.5]
    assert out.stats["gradient_factor"].tolist() == pytest.approx([0.5, 0.5])


def test_a_loop_over_pairs_gives_the_same():
    policy, reference = lists(1, 5)
    phi = preference((0.2, 0.9, 0.2, 1.0, 0.0))
    delta = pair_weights(phi)[0]
    reward = (-0.5 * 800 * (policy - reference))[0].tolist()
    expected = sum(
        delta[i, j].item() * math.log1p(math.exp(-(reward[i] - reward[j])))
        for i, j in itertools.permutations(range(5), 2)
        if phi[0, i] > phi[0, j]
    )
    assert rankdpo_loss(policy, reference, phi, beta=800.0).loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"rank_source": "model"}, {"weighting": "gain"}, {"weighting": "none"}])
@pytest.mark.parametrize("phi", [CLEAN, (1.0, 0.5, 0.5, 0.0), (0.0, 0.0, 1.0, 1.0)])
def test_the_order_of_a_list_does_not_matter(options, phi):
    policy, reference = lists(1, 4)
    phi = preference(phi)
    out, gradient = rankdpo_loss(policy, reference, phi, **options), slopes(policy, reference, phi, **options)
    for order in itertools.permutations(range(4)):
        permuted = (x[:, order] for x in (policy, reference, phi))
        again = rankdpo_loss(*permuted, **options)
        assert again.loss.item() == pytest.approx(out.loss.item(), rel=1e-13)
        moved = slopes(policy[:, order].detach().requires_grad_(), reference[:, order], phi[:, order], **options)
        assert torch.allclose(moved, gradient[:, order], rtol=1e-11)
        for name, value in out.stats.items():
            assert again.stats[name].item() == pytest.approx(value.item(), rel=1e-11), name


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("k", [1, 4])
def test_nothing_to_tell_apart_is_no_loss_and_no_gradient(weighting, k):
    policy, reference = lists(3, k)
    out = rankdpo_loss(policy, reference, torch.full((3, k), 0.5), weighting=weighting)
    (gradient,) = torch.autograd.grad(out.loss.sum(), policy)
    assert out.loss.abs().max() == 0
    assert gradient.abs().max() == 0
    assert out.stats["rewards/accuracies"].tolist() == out.stats["gradient_factor"].tolist() == [0.5] * 3
    assert out.stats["rewards/margins"].tolist() == out.stats["weights/sum"].tolist() == [0] * 3
    assert all(torch.isfinite(value).all() for value in out.stats.values())


# --- gradients ---------------------------------------------------------------------------------------------------


OPTIONS = [{}, {"gain": "linear"}, {"log_base": math.e}, {"rank_source": "model"}, {"weighting": "gain"}]


@pytest.mark.parametrize("options", [*OPTIONS, {"weighting": "none"}])
def test_best_error_up_raises_worst_error_up_lowers_and_slopes_sum_to_zero(options):
    policy, reference = lists(20, 4)
    gradient = slopes(policy, reference, preference((0.3, 1.0, 0.0, 0.6)).expand(20, 4), beta=1000.0, **options)
    assert (gradient[:, 1] > 0).all()
    assert (gradient[:, 2] < 0).all()
    assert gradient.sum(1).abs().max() < 1e-9 * gradient.abs().max()


def test_label_weights_do_not_depend_on_the_policy_and_model_weights_do_without_gradient():
    policy, reference = lists(1, 4)
    phi = preference(CLEAN)
    worst_first = reference - torch.tensor([[0.0, 1e-4, 2e-4, 3e-4]])  # rewards rise from the best to the worst
    for source, changes in (("label", False), ("model", True)):
        sums = {
            rankdpo_loss(p, reference, phi, rank_source=source).stats["weights/sum"].item()
            for p in (reference, worst_first)
        }
        assert (len(sums) == 2) == changes
    reward = torch.arange(4.0, dtype=torch.float64)[None].requires_grad_()  # ranks 4, 3, 2, 1
    delta = pair_weights(phi, rank_source="model", reward=reward)
    assert not delta.requires_grad
    gains = 2 ** phi[0] - 1
    assert delta[0, 0, 1].item() == pytest.approx((gains[0] - gains[1]).item() * (1 / 2 - 1 / math.log2(5)), rel=1e-12)


def test_model_ranks_start_as_label_ranks():
    policy, _ = lists(2, 4)
    phi = preference(CLEAN, (0.5, 0.5, 1.0, 0.0))
    label, model = (rankdpo_loss(policy, policy.detach(), phi, rank_source=s) for s in ("label", "model"))
    assert torch.equal(label.loss, model.loss)
    assert (model.loss > 0).all()


def test_lists_do_not_mix():
    policy, reference = lists(3, 4)
    phi = preference(CLEAN, (0.0, 1.0, 1.0, 0.3), (0.2, 0.2, 0.2, 0.2))
    loss = rankdpo_loss(policy, reference, phi).loss
    singles = [rankdpo_loss(policy[i : i + 1], reference[i : i + 1], phi[i : i + 1]).loss for i in range(3)]
    assert torch.allclose(loss, torch.cat(singles), rtol=1e-14)
    (gradient,) = torch.autograd.grad(loss[0], policy)
    assert gradient[1:].abs().max() == 0


def test_without_the_last_image_the_others_keep_their_weights():
    assert torch.equal(pair_weights(preference(CLEAN))[:, :3, :3], pair_weights(preference(CLEAN[:3])))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_list_whose_worst_image_has_no_weight_is_the_list_without_it(options, monkeypatch):
    """Oracle 7.5.11, in loss and gradient."""
    policy, reference = lists(2, 4)
    phi = preference(CLEAN).expand(2, 4)
    # Rewards fall with the labels, so that the worst image is the last by the model's ranks too.
    policy = (reference + torch.linspace(0, 1e-4, 4, dtype=torch.float64)).requires_grad_()
    short, short_slopes = (f(policy[:, :3], reference[:, :3], phi[:, :3], **options) for f in (rankdpo_loss, slopes))
    full = rankdpo_loss(policy, reference, phi, **options).loss
    kept = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    monkeypatch.setattr(
        "diffalign.objectives.rankdpo.pair_weights", lambda *a, **k: pair_weights(*a, **k) * kept * kept[:, None]
    )
    dropped = rankdpo_loss(policy, reference, phi, **options).loss
    assert torch.allclose(dropped, short.loss, rtol=1e-12) and (full > dropped + 0.1).all()
    assert torch.allclose(slopes(policy, reference, phi, **options), torch.nn.functional.pad(short_slopes, (0, 1)))


def test_stats_name_best_and_worst_wherever_they_stand():
    policy, reference = lists(1, 4)
    out = rankdpo_loss(policy, reference, preference((0.2, 1.0, 0.0, 0.0)))
    reward = -2500 * (policy - reference).detach()[0]
    assert out.stats["rewards/chosen"].item() == pytest.approx(reward[1].item())
    assert out.stats["rewards/rejected"].item() == pytest.approx(reward[2:].mean().item())
    assert out.stats["error/winner"].item() == policy[0, 1].item()
    assert out.stats["error/loser"].item() == pytest.approx(policy[0, 2:].mean().item())
    ordered = [(1, 0), (1, 2), (1, 3), (0, 2), (0, 3)]
    right = [float(reward[i] > reward[j]) for i, j in ordered]
    assert out.stats["rewards/accuracies"].item() == pytest.approx(sum(right) / 5)


def test_finite_at_extreme_errors():
    policy = torch.tensor([[0.0, 1e4, 0.0], [1e4, 0.0, 5.0]], requires_grad=True)
    phi = torch.tensor([[1.0, 0.5, 0.0]]).expand(2, 3)
    loss = rankdpo_loss(policy, torch.zeros(2, 3), phi).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preference": torch.tensor([[0.0, 0.5, math.nan]]).expand(2, 3)}, r"preference\[0, 2\] is nan"),
        ({"preference": torch.tensor([[0.0, 0.5, 1.0], [0.0, 21.3, 0.5]])}, r"preference\[1, 1\] is 21.2"),
        ({"preference": torch.rand(2, 4)}, "shape of policy_error"),
        ({"policy_error": torch.rand(2, 0), "reference_error": torch.rand(2, 0)}, "k >= 1"),
        ({"weighting": "gains"}, "gain_discount, gain, none"),
        ({"gain": "log"}, "exponential, linear"),
        ({"rank_source": "policy"}, "label, model"),
        ({"log_base": 1.0}, "log_base"),
        ({"weighting": "none", "gain": "linear"}, "gain='linear' would have no effect"),
        ({"weighting": "gain", "log_base": 2.0}, "log_base=2.0 would have no effect"),
        ({"weighting": "gain", "rank_source": "model"}, "rank_source='model' would have no effect"),
        ({"beta": 0.0}, "beta must be"),
    ],
)
def test_bad_input_is_refused_with_a_word(change, message):
    arguments = {
        "policy_error": torch.rand(2, 3),
        "reference_error": torch.rand(2, 3),
        "preference": torch.rand(2, 3),
    }
    with pytest.raises(ValueError, match=message):
        rankdpo_loss(**(arguments | change))


def test_rewards_go_with_model_ranks_and_only_with_them():
    for options in ({"reward": torch.rand(1, 4)}, {"rank_source": "model"}):
        with pytest.raises(ValueError, match="both or neither"):
            pair_weights(preference(CLEAN), **options)

"""Backward in chunks from the derivatives by each error equals backward in one go."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffalign.objectives import (
    LossOutput,
    dpo_loss,
    error_gradients,
    mapo_loss,
    rankdpo_loss,
    sft_loss,
    smpo_loss,
    with_sft,
)

Objective = Callable[[Tensor, Tensor], LossOutput]
PAIRS: dict[str, Objective] = {
    "dpo": lambda e, r: dpo_loss(e, r, beta=50.0, label_smoothing=0.1),
    "ipo": lambda e, r: dpo_loss(e, r, beta=50.0, loss_type="ipo"),
    "mapo": lambda e, r: mapo_loss(e),
    "smpo": lambda e, r: smpo_loss(e, r, torch.linspace(0.1, 0.9, len(e)), beta=50.0),
    "anchored": lambda e, r: with_sft(dpo_loss(e, r, beta=50.0), e, 3.0),
}
LISTS: dict[str, Objective] = {
    "rankdpo": lambda e, r: rankdpo_loss(e, r, torch.linspace(0, 1, e.shape[1]).expand_as(e), beta=50.0),
    "rankdpo by model": lambda e, r: rankdpo_loss(
        e, r, torch.linspace(0, 1, e.shape[1]).expand_as(e), beta=50.0, rank_source="model"
    ),
    "sft": lambda e, r: sft_loss(e),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)).double()


@pytest.mark.parametrize(("name", "k"), [*((n, 2) for n in PAIRS), *((n, 8) for n in LISTS)])
def test_chunks_have_the_gradient_of_one_pass(name, k):
    objective, model = (PAIRS | LISTS)[name], network()
    x, target = torch.randn(4 * k, 6, dtype=torch.float64), torch.randn(4 * k, 6, dtype=torch.float64)
    reference = torch.rand(4, k, dtype=torch.float64) + 0.5

    def error(rows: slice) -> Tensor:
        return (model(x[rows]) - target[rows]).square().mean(1)

    direct = objective(error(slice(None)).view(4, k), reference)
    direct.loss.mean().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    with torch.no_grad():
        detached = error(slice(None)).view(4, k)
        out, weights = error_gradients(lambda e: objective(e, reference), detached)
    assert weights.shape == (4, k)
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, direct.loss)
    assert all(torch.equal(out.stats[n], value) for n, value in direct.stats.items())
    for start in range(0, 4 * k, 3):  # chunks that cut through the lists
        rows = slice(start, start + 3)
        (weights.flatten()[rows] / 4 * error(rows)).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-10, atol=1e-14)


def test_the_callers_graph_and_mode_do_not_matter():
    reference = torch.rand(3, 2)
    policy = torch.rand(3, 2, requires_grad=True)
    _, weights = error_gradients(lambda e: dpo_loss(e, reference, beta=5.0), policy * 2)
    assert policy.grad is None
    with torch.inference_mode():
        _, again = error_gradients(lambda e: dpo_loss(e, reference, beta=5.0), policy.detach() * 2)
    assert torch.equal(weights, again)
    assert (weights[:, 0] > 0).all()
    assert (weights[:, 1] < 0).all()


def test_an_objective_without_a_graph_is_refused():
    with pytest.raises(ValueError, match="differentiable"):
        error_gradients(lambda e: LossOutput(e.detach()[:, 0]), torch.rand(3, 2))

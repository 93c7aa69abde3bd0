from __future__ import annotations

import torch

from diffalign.objectives import sft_loss


def test_only_the_winner_counts():
    policy = torch.rand(3, 4, requires_grad=True)
    out = sft_loss(policy)
    out.loss.sum().backward()
    assert torch.equal(out.loss, policy[:, 0])
    assert torch.equal(policy.grad, torch.tensor([1.0, 0, 0, 0]).expand(3, 4))
    assert torch.equal(out.stats["error/loser"], policy[:, -1].detach())

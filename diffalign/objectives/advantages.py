"""How much better than its group a picture is: rewards to advantages, in fp64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCALES = ("group", "fixed", "none")


def group_advantages(
    rewards: Tensor, groups: Tensor, *, scale: str = "group", clip: float = 5.0, min_spread: float = 1e-6
) -> Tensor:
    """Advantages of pictures within their groups, for one reward.

    1. Centre: subtract the mean of the group's rewards that are there.
    2. Scale: ``group`` divides by the group's population standard deviation; ``fixed`` by that of the win rates of a
       strict ranking, sqrt((G + 1) / (12 (G - 1))); ``none`` by nothing.
    3. Clip to [-clip, clip].

    Dividing by the group's own spread makes a group that is all but tied as loud as a clear one (one pair told apart
    among 8 equal pictures gets +-2). The fixed scale keeps what a win rate says: there that pair gets +-0.22.

    Args:
        rewards: (N,); NaN is missing: it has advantage 0 and the others do not see it.
        groups: (N,) int64, which group each belongs to.
        scale: see above.
        clip: largest absolute advantage.
        min_spread: a group whose highest and lowest reward differ by less has advantages of exactly 0. In fp32, or
            without this guard, rounding of a constant group's mean becomes advantages near 1.

    Returns:
        (N,) fp64; groups with fewer than two rewards have 0.

    Raises:
        ValueError: shapes that differ, group ids that are no integers, or an unknown scale.
    """
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards and groups must be (N,); got {tuple(rewards.shape)} and {tuple(groups.shape)}.")
    if groups.dtype != torch.int64:
        raise ValueError(f"groups must be int64 ids, got {groups.dtype}: floats merge large ids.")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}; got {scale!r}.")
    values = rewards.to(torch.float64)
    advantages = torch.zeros_like(values)
    for group in groups.unique():
        members = (groups == group) & torch.isfinite(values)
        found = values[members]
        spread = float(found.max() - found.min()) if len(found) > 1 else 0.0
        if spread == 0 or spread < min_spread:
            continue
        centred = found - found.mean()
        if scale == "group":
            centred = centred / centred.square().mean().sqrt()
        elif scale == "fixed":
            centred = centred / ranking_std(len(found))
        advantages[members] = centred.clamp(-clip, clip)
    return advantages


def ranking_std(size: int) -> float:
    """Population standard deviation of the win rates 0, 1/(G-1), ..., 1 of a strict ranking of G pictures."""
    return math.sqrt((size + 1) / (12 * (size - 1)))


def combined_advantages(
    rewards: Tensor, groups: Tensor, weights: Tensor, *, scale: str = "group", clip: float = 5.0, **options: float
) -> Tensor:
    """Several rewards: each is normalised within its group first, then they are added with their weights.

    A reward's unit therefore does not matter. (Adding raw rewards first lets the one with the largest spread decide.)

    Args:
        rewards: (N, R).
        groups: (N,).
        weights: (R,).
        scale, clip, options: as in :func:`group_advantages`; the sum is clipped too.
    """
    parts = [group_advantages(column, groups, scale=scale, clip=clip, **options) for column in rewards.T]
    return (torch.stack(parts, 1) @ weights.to(torch.float64)).clamp(-clip, clip)


def check_groups(groups: Tensor, size: int) -> None:
    """Refuse groups that are not all of ``size`` members: an id was lost or counted twice between processes.

    Raises:
        ValueError: names the group.
    """
    ids, counts = groups.unique(return_counts=True)
    wrong = counts != size
    if bool(wrong.any()):
        group, count = int(ids[wrong][0]), int(counts[wrong][0])
        raise ValueError(f"every group must have {size} pictures; group {group} has {count}.")

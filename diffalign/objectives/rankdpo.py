"""RankDPO: Diffusion-DPO on all pairs of a ranked list, weighted by what swapping a pair would cost in DCG."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import LossOutput, check_errors, check_unit, correct, option
from .dpo import implicit_reward, pair_loss

WEIGHTINGS = ("gain_discount", "gain", "none")
GAINS = ("exponential", "linear")
RANK_SOURCES = ("label", "model")


def rankdpo_loss(
    policy_error: Tensor,
    reference_error: Tensor,
    preference: Tensor,
    *,
    beta: float = 5000.0,
    weighting: str = "gain_discount",
    gain: str | None = None,
    log_base: float | None = None,
    rank_source: str | None = None,
) -> LossOutput:
    """RankDPO (Karthik et al. 2024, arXiv:2410.18013, Eq. 5-7 and Algorithm 2), in DPO's scale of beta.

    Notation: policy_error -> l_i; reference_error -> r_i; preference -> phi_i.

    1. implicit reward of each image, as in DPO   rho_i   = -beta/2 (l_i - r_i)
    2. logit of each pair                         g_ij    = rho_i - rho_j
    3. weight of each pair, a constant            Delta_ij, see :func:`pair_weights`
    4. loss of the list                           sum over phi_i > phi_j of Delta_ij (-log sigmoid(g_ij))

    Which image of a pair is the better one is always read from ``preference``, never from the order of the list, and
    a tied pair has weight 0. Permuting the images of a list changes nothing. The sum over pairs is not divided by
    their number. With k = 2 it is DPO times one constant, and with ``weighting="none"`` DPO itself on every pair.

    A list with nothing to tell apart, one image or equal preferences throughout, has loss 0 and gradient 0; its
    accuracy and gradient factor are reported as 1/2, its margins as 0.

    Args:
        policy_error: (B, k) squared error, mean over C, H, W; images in any order; fp32 or fp64.
        reference_error: (B, k) the same with the reference model.
        preference: (B, k) phi in [0, 1], higher is better; equal values are ties.
        beta: strength of the pull to the reference, as in DPO (mean over C, H, W and a factor 1/2).
        weighting: ``gain_discount``, the method; ``gain``, the paper's ablation without positions; ``none``, weight 1
            for every ordered pair.
        gain: ``exponential``, 2^phi - 1, or ``linear``, 2 phi - 1, the other way to read the print; None means
            exponential. Not read by ``none``.
        log_base: of the discount; None means 2. Another base multiplies all weights by one constant. Read by
            ``gain_discount`` only.
        rank_source: ranks for the discount from the ``label`` (None), or from the ``model``'s implicit rewards, without
            gradient. Read by ``gain_discount`` only.

    Returns:
        Loss per list (B,) and stats: ``rewards/chosen`` and ``rewards/rejected`` (best and worst image; the mean where
        several tie for it), ``rewards/best_vs_worst`` (their difference), ``rewards/margins`` and
        ``rewards/accuracies`` (mean over ordered pairs, a tie of rewards counts 1/2), ``gradient_factor`` (weighted
        mean of sigmoid(-g)), ``error/winner``, ``error/loser``, ``error/winner_change``, ``error/loser_change`` (best
        and worst), and ``weights/sum``.

    Raises:
        ValueError: wrong shapes, half precision, a preference outside [0, 1] or NaN, an unknown option, or one that
            the weighting does not read.
    """
    check_errors(policy_error, reference_error, width=None)
    preference = check_preference(preference, policy_error)
    reward = implicit_reward(policy_error, reference_error, beta)
    weight = pair_weights(
        preference,
        weighting=weighting,
        gain=gain,
        log_base=log_base,
        rank_source=rank_source,
        reward=reward.detach() if rank_source == "model" else None,
    )
    weight = weight * _better(preference)
    logit = reward.unsqueeze(2) - reward.unsqueeze(1)
    loss = (weight * pair_loss(logit)).sum((1, 2))
    stats = _list_stats(reward.detach(), logit.detach(), weight, preference)
    best, worst = best_weights(preference), best_weights(-preference)
    errors = (("", policy_error.detach()), ("_change", (policy_error - reference_error).detach()))
    for suffix, error in errors:
        stats[f"error/winner{suffix}"] = (best * error).sum(1)
        stats[f"error/loser{suffix}"] = (worst * error).sum(1)
    return LossOutput(loss, stats)


def pair_weights(
    preference: Tensor,
    *,
    weighting: str = "gain_discount",
    gain: str | None = None,
    log_base: float | None = None,
    rank_source: str | None = None,
    reward: Tensor | None = None,
) -> Tensor:
    """Delta_ij = |G_i - G_j| |1/D_i - 1/D_j|: the change of DCG if images i and j swapped their places.

    G is the gain of an image, D_i = log(1 + rank) with rank 1 for the best. Images that tie share the mean of 1/D over
    the ranks they occupy, so that no weight depends on the order in which a list happens to be stored.

    Ranks by the ``model`` go by implicit reward. Images with equal rewards are ranked by label: at the first step the
    policy is its reference, all rewards are 0, and without this every weight would be 0 and stay so.

    Args:
        preference: (B, k) phi in [0, 1], floating point.
        weighting: ``gain_discount``; ``gain``, without the second factor; ``none``, 1 for every pair that differs.
        gain: ``exponential`` (None) or ``linear``.
        log_base: of D, above 1; None means 2.
        rank_source: ``label`` (None) or ``model``.
        reward: (B, k) implicit rewards; needed for, and read by, ``rank_source="model"`` only.

    Returns:
        (B, k, k), symmetric, without gradient; 0 on the diagonal and for tied pairs.

    Raises:
        ValueError: an unknown option, or one that nothing would read.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}; got {weighting!r}.")
    discounted = weighting == "gain_discount"
    by_gain = "weighting 'gain_discount' or 'gain'"
    gain = option("gain", gain, "exponential", read=weighting != "none", reader=by_gain)
    log_base = option("log_base", log_base, 2.0, read=discounted, reader="weighting 'gain_discount'")
    rank_source = option("rank_source", rank_source, "label", read=discounted, reader="weighting 'gain_discount'")
    if gain not in GAINS:
        raise ValueError(f"gain must be one of {', '.join(GAINS)}; got {gain!r}.")
    if rank_source not in RANK_SOURCES:
        raise ValueError(f"rank_source must be one of {', '.join(RANK_SOURCES)}; got {rank_source!r}.")
    if (reward is not None) != (rank_source == "model"):
        raise ValueError("reward is what rank_source='model' ranks by: pass both or neither.")

    preference = preference.detach()
    better = _better(preference)
    different = better | better.transpose(1, 2)
    if weighting == "none":
        return different.to(preference.dtype)
    gains = torch.exp2(preference) - 1 if gain == "exponential" else 2 * preference - 1
    weight = _distance(gains)
    if discounted:
        if reward is not None:
            reward = reward.detach()
            better = _better(reward) | ((reward.unsqueeze(2) == reward.unsqueeze(1)) & better)
        weight = weight * _distance(_inverse_discount(better, log_base, weight.dtype))
    return weight


def check_preference(preference: Tensor, policy_error: Tensor) -> Tensor:
    """The preferences in the errors' dtype; refused if of another shape, outside [0, 1], or NaN."""
    if preference.shape != policy_error.shape:
        raise ValueError(
            f"preference must have the shape of policy_error, {tuple(policy_error.shape)}; "
            f"got {tuple(preference.shape)}."
        )
    check_unit("preference", preference)
    return preference.detach().to(policy_error.dtype)


def best_weights(preference: Tensor) -> Tensor:
    """(B, k) weights that pick the best image of each list: 1, or 1/m each where m images tie for it."""
    top = (preference == preference.amax(1, keepdim=True)).to(preference.dtype)
    return top / top.sum(1, keepdim=True)


def _better(value: Tensor) -> Tensor:
    """(B, k, k): whether i has a higher value than j."""
    return value.unsqueeze(2) > value.unsqueeze(1)


def _distance(value: Tensor) -> Tensor:
    return (value.unsqueeze(2) - value.unsqueeze(1)).abs()


def _inverse_discount(better: Tensor, log_base: float, dtype: torch.dtype) -> Tensor:
    """1/D of every image (B, k); averaged over the ranks that tied images occupy.

    Args:
        better: (B, k, k) a strict order with ties: whether i stands before j.
        log_base: of D = log(1 + rank).
    """
    if not 1 < log_base < math.inf:
        raise ValueError(f"log_base must be a finite number above 1; got {log_base!r}.")
    k = better.shape[1]
    before = better.sum(1)  # images that stand before j: it shares the ranks before + 1 .. before + tied
    tied = (~(better | better.transpose(1, 2))).sum(1)
    # A table of means by (before, tied - 1), made on the CPU: some accelerators have no fp64.
    inverse = math.log(log_base) / torch.arange(2, k + 2, dtype=torch.float64).log()
    total = torch.cat([inverse.new_zeros(1), inverse.cumsum(0)])
    start, count = torch.arange(k).unsqueeze(1), torch.arange(1, k + 1)
    table = (total[(start + count).clamp(max=k)] - total[start]) / count
    return table.to(better.device, dtype)[before, tied - 1]


def _list_stats(reward: Tensor, logit: Tensor, weight: Tensor, preference: Tensor) -> dict[str, Tensor]:
    """Rewards of best and worst image, and means over the ordered pairs."""
    ordered = _better(preference).to(reward.dtype)
    count, total = ordered.sum((1, 2)), weight.sum((1, 2))
    half, zero = torch.full_like(count, 0.5), torch.zeros_like(count)
    chosen = (best_weights(preference) * reward).sum(1)
    rejected = (best_weights(-preference) * reward).sum(1)
    pull = (weight * torch.sigmoid(-logit)).sum((1, 2))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/best_vs_worst": chosen - rejected,
        "rewards/margins": torch.where(count > 0, (ordered * logit).sum((1, 2)) / count, zero),
        "rewards/accuracies": torch.where(count > 0, (ordered * correct(logit)).sum((1, 2)) / count, half),
        "gradient_factor": torch.where(total > 0, pull / total, half),
        "weights/sum": total,
    }

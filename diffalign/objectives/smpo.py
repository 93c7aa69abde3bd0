"""SmPO: Diffusion-DPO in which reward scores say how sure each label is."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import LossOutput, check_errors, check_positive, check_probability
from .dpo import implicit_reward, pair_loss, pair_stats

CONTRADICTIONS = ("follow_scores", "undecided")


def smpo_loss(
    policy_error: Tensor,
    reference_error: Tensor,
    probability: Tensor,
    *,
    beta: float = 5000.0,
    gamma: float = 10.0,
) -> LossOutput:
    """Smoothed preference optimization (SmPO-Diffusion, arXiv:2506.02698; scale as in the authors' code).

    Notation: policy_error -> l_w, l_l; reference_error -> r_w, r_l; probability -> p.

    1. implicit reward of each image, as in DPO   rho = -beta/2 (l - r)
    2. weight of the pair                         c   = gamma (2p - 1)
    3. logit and loss                             g   = c (rho_w - rho_l),  -log sigmoid(g)

    The weight is inside the logit: it scales beta, pair by pair. With p = 1/2 the loss is ln 2 and the gradient exactly
    zero; with p = 1 and gamma = 1 it is DPO bit for bit; with p < 1/2 the pair is trained with its images swapped.
    This is not ``dpo_loss(probability=p)``, which mixes the losses of both orders and holds a tie at the reference.

    The method's other half, inverted instead of random noise, is where the errors come from:
    see :func:`diffalign.diffusion.invert`.

    Args:
        policy_error: (B, 2) squared error, mean over C, H, W; winner first; fp32 or fp64.
        reference_error: (B, 2) the same with the reference model, on the same noisy latents and targets.
        probability: (B,) p, that the first image is the better one; from scores: :func:`soft_probability`.
        beta: as in DPO (mean over C, H, W and a factor 1/2), for a pair of weight 1.
        gamma: calibrates the weight. The published 10 belongs to a score range from the worst to the best image of the
            whole data set, where most pairs have p close to 1/2.

    Returns:
        Per-pair loss (B,) and DPO's stats (rewards and margins without the weight, so that they compare with DPO's;
        ``gradient_factor`` is sigmoid(-g)), and ``weights/pair``, c.

    Raises:
        ValueError: wrong shapes, half precision, a probability outside [0, 1], or a scale that is not positive.
    """
    check_errors(policy_error, reference_error)
    check_positive("gamma", gamma)
    reward = implicit_reward(policy_error, reference_error, beta)
    margin = reward[:, 0] - reward[:, 1]
    weight = gamma * (2 * check_probability(probability, margin) - 1)
    logit = weight * margin
    stats = pair_stats(reward, logit, policy_error - reference_error)
    return LossOutput(pair_loss(logit), {**stats, "weights/pair": weight.detach()})


def soft_probability(score_difference: Tensor, score_range: float, *, contradiction: str = "undecided") -> Tensor:
    """Probability that the winner is the better image, from reward scores: sigmoid(difference / range).

    Scores and range may be shifted and scaled together without effect. With gamma = 10 the weight in
    :func:`smpo_loss` is 10 tanh(difference / (2 range)): at most 4.62 for scores within the range.

    Args:
        score_difference: (B,) score of the winner minus that of the loser, any reward model.
        score_range: R_max - R_min of that reward model over the data set, > 0. A property of the data: another reward
            model or data set has another range.
        contradiction: what a pair gets whose loser has the higher score: ``undecided`` raises p to 1/2, which trains
            nothing; ``follow_scores`` keeps p < 1/2, which trains the pair swapped, as the scores say. To drop such
            pairs instead, leave them out when pairs are selected (:func:`diffalign.data.soften`).

    Returns:
        (B,) probabilities in the dtype of ``score_difference``.

    Raises:
        ValueError: a range that is not positive, a score that is not finite, or an unknown policy.
    """
    check_positive("score_range (R_max - R_min)", score_range)
    if contradiction not in CONTRADICTIONS:
        raise ValueError(
            f"contradiction must be one of {', '.join(CONTRADICTIONS)}; got {contradiction!r}. Dropping pairs is a "
            "choice of data, see diffalign.data.soften."
        )
    finite = torch.isfinite(score_difference)
    if not bool(finite.all()):
        index = int((~finite).nonzero()[0, 0])
        raise ValueError(
            f"score_difference[{index}] is {score_difference[index].item()}: a score is missing. "
            "Leave such pairs out before training."
        )
    probability = torch.sigmoid(score_difference / score_range)
    return probability.clamp(min=0.5) if contradiction == "undecided" else probability

"""Several reward models as one: shares of votes, z-scores or a weighted mean, with every member's raw scores kept.

Votes and z-scores are relative: they compare a picture with the other pictures of the same prompt in the same call.
Such a group of pictures is the unit here, of the vote and of what is done about missing scores.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import source_hash
from .errors import RewardModelError
from .images import to_pil
from .protocol import RewardModel

RULES = ("votes", "zscore", "mean")
MISSING = ("skip_model", "skip_row", "skip_picture")


def combine(
    raw: Mapping[str, Tensor],
    prompts: Sequence[str],
    *,
    rule: str = "votes",
    weights: Mapping[str, float] | None = None,
    missing: str = "skip_model",
) -> Tensor:
    """One score for each picture from the raw scores of several models.

    Args:
        raw: (N,) scores by member; NaN is missing.
        prompts: N prompts; pictures with equal ones form a group.
        rule: ``votes`` is the share of wins against the rest of the group, in [0, 1] (phi of RankDPO's Algorithm 1: a
            member votes on every pair, a tie is nobody's win). ``zscore`` is the weighted mean of each member's scores
            in units of its standard deviation (population) over the group, 0 where a member ties them all. ``mean``
            is the weighted mean of the raw scores, for members on one scale.
        weights: weight of each member; 1 where none is given.
        missing: what a missing score does to its group. ``skip_model``: that member has no say in it. ``skip_row``:
            the whole group is missing. ``skip_picture``: that picture is missing and the others are compared.

    Returns:
        (N,) fp32. NaN where the rule for missing scores leaves nothing, and, for votes and z-scores, where a picture
        has no other to be compared with.

    Raises:
        RewardModelError: an unknown rule, member or weight, or scores that do not fit the prompts.
    """
    weight = _checked_weights(raw, len(prompts), rule, weights, missing)
    table = torch.stack([values.double() for values in raw.values()])  # (M, N)
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(place)
    combined = torch.full((len(prompts),), math.nan, dtype=torch.float64)
    for places in groups.values():
        index = torch.tensor(places)
        scores, counts = table[:, index], weight
        absent = scores.isnan()
        if missing == "skip_row" and absent.any():
            continue
        if missing == "skip_picture":
            index, scores = index[~absent.any(dim=0)], scores[:, ~absent.any(dim=0)]
        elif missing == "skip_model":
            scores, counts = scores[~absent.any(dim=1)], weight[~absent.any(dim=1)]
        if scores.shape[0] and scores.shape[1] >= (1 if rule == "mean" else 2):
            combined[index] = counts @ _relative(scores, rule) / counts.sum()
    return combined.float()


def _relative(scores: Tensor, rule: str) -> Tensor:
    """(M, k) raw scores of one group to (M, k) contributions."""
    if rule == "votes":
        return (scores[:, :, None] > scores[:, None, :]).sum(-1).double() / (scores.shape[1] - 1)
    if rule == "zscore":
        # Equal scores are told by their spread: a computed deviation of equal numbers need not be zero.
        tied = (scores.max(1, keepdim=True).values == scores.min(1, keepdim=True).values).expand_as(scores)
        centred = scores - scores.mean(1, keepdim=True)
        return torch.where(tied, 0.0, centred / scores.std(1, correction=0, keepdim=True))
    return scores


def _checked_weights(
    raw: Mapping[str, Tensor], count: int, rule: str, weights: Mapping[str, float] | None, missing: str
) -> Tensor:
    """(M,) fp64."""
    check_rules(rule, missing)
    if not raw:
        raise RewardModelError("an ensemble needs one member or more, got none.")
    for name, values in raw.items():
        if values.shape != (count,):
            raise RewardModelError(f"{name}: expected {count} scores, got shape {tuple(values.shape)}.")
    given = dict(weights or {})
    if unknown := given.keys() - raw.keys():
        raise RewardModelError(f"weights name {', '.join(sorted(unknown))}; the members are {', '.join(raw)}.")
    if bad := [name for name, value in given.items() if not (math.isfinite(value) and value > 0)]:
        raise RewardModelError(f"weight of {bad[0]}: expected a positive number, got {given[bad[0]]}.")
    return torch.tensor([float(given.get(name, 1.0)) for name in raw], dtype=torch.float64)


def check_rules(rule: str, missing: str) -> None:
    """Refuse an unknown rule."""
    for label, value, known in (("rule", rule, RULES), ("missing", missing, MISSING)):
        if value not in known:
            raise RewardModelError(f"ensemble: {label} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}.")


class Ensemble:
    """A reward model made of others; see :func:`combine` for the rules.

    ``score`` sees one call: give it all pictures of a prompt at once. With ``mean``, a call may be cut anywhere.

    Args:
        members: names or ready models, or mappings ``{"model": name, option: value, ...}``.
        rule: ``votes``, ``zscore`` or ``mean``.
        weights: by member's name; 1 where none is given.
        missing: ``skip_model``, ``skip_row`` or ``skip_picture``.
        device: where members with weights run.

    Raises:
        RewardModelError: an unknown rule, a member that cannot be loaded or only compares pairs, or two of one name.
    """

    name = "ensemble"
    batch_size = sys.maxsize  # callers that cut their calls to a model's batch size must not cut a group

    def __init__(
        self,
        members: Sequence[str | RewardModel | Mapping[str, Any]],
        rule: str = "votes",
        *,
        weights: Mapping[str, float] | None = None,
        missing: str = "skip_model",
        device: str | None = None,
    ) -> None:
        from .registry import load_reward_model

        if isinstance(members, str):
            raise RewardModelError(f"ensemble: expected a list of members, got {members!r}; put it in a list.")
        self.rule, self.missing, self.weights = rule, missing, dict(weights or {})
        self.members: dict[str, RewardModel] = {}
        for member in members:
            options = dict(member) if isinstance(member, Mapping) else {"model": member}
            if "model" not in options:
                raise RewardModelError(f"ensemble: expected a member with the key 'model', got {options}.")
            model = load_reward_model(options.pop("model"), **({"device": device} | options))
            if not isinstance(model, RewardModel):
                raise RewardModelError(f"ensemble: {model.name} only compares pairs; a member must score pictures.")
            if model.name in self.members:
                raise RewardModelError(f"ensemble: two members are named {model.name}; each may come once.")
            self.members[model.name] = model
        _checked_weights({name: torch.empty(0) for name in self.members}, 0, rule, weights, missing)

    @property
    def identity(self) -> dict[str, str | None]:
        """The revision is a hash of the rules, the weights and all members' identities."""
        parts = {name: dict(model.identity) for name, model in self.members.items()}
        text = json.dumps([self.rule, self.missing, self.weights, parts], sort_keys=True)
        revision = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        known = all(part["code_version"] is not None for part in parts.values())
        code = source_hash(combine, _relative, type(self)) if known else None
        return {"id": f"{self.rule} of {', '.join(self.members)}", "revision": revision, "code_version": code}

    def score_members(self, images: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
        """(N,) raw scores of each member; pictures in any form :func:`reward_models.to_pil` reads."""
        pictures = to_pil(images)  # read once for all members
        return {name: model.score(pictures, prompts) for name, model in self.members.items()}

    def combine(self, raw: Mapping[str, Tensor], prompts: Sequence[str]) -> Tensor:
        """(N,) by this ensemble's rules, from raw scores that :meth:`score_members` gave."""
        return combine(raw, prompts, rule=self.rule, weights=self.weights, missing=self.missing)

    def score(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """(N,) fp32 on the CPU, NaN where missing; relative to the pictures of the same prompt in this call."""
        return self.combine(self.score_members(images, prompts), prompts)

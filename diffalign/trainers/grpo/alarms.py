"""Alarms of online methods: the reward is gamed, or nothing is left to learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from ..health import CHECKS, Curves

SIGNIFICANT = 2.0  # standard errors that a hold-out must have fallen, and the training reward risen
IN_A_ROW = 2  # hold-out measurements that must agree
SILENT = 0.5  # share of groups in which every picture is as good as the others
FADED = 0.1  # share of the spread of a reward at the start
COLLAPSE = 0.5  # share of the diversity at the start


def reward_hacking(curves: Curves, active: bool) -> str | None:
    """The reward that is trained on rises on hold-out prompts while one that is not falls."""
    measured = [row for row in curves.rows if any(name.startswith("holdout/") for name in row)][-IN_A_ROW:]
    if len(measured) < IN_A_ROW:
        return None
    unseen = {
        name.removesuffix("_change")
        for name in measured[-1]
        if name.startswith("holdout/") and name.endswith("_change") and not name.startswith("holdout/training-")
    }
    trained = {n.removesuffix("_change") for n in measured[-1] if n.startswith("holdout/training-") and "_change" in n}
    if not any(all(_sigmas(row, name) > SIGNIFICANT for row in measured) for name in trained):
        return None
    limit = SIGNIFICANT / 2 if active else SIGNIFICANT
    fallen = sorted(name for name in unseen if all(_sigmas(row, name) < -limit for row in measured))
    if not fallen:
        return None
    drops = ", ".join(f"{n.removeprefix('holdout/')} {measured[-1][n + '_change']:+.3g}" for n in fallen)
    return (
        f"the training reward has risen on hold-out prompts while others have fallen ({drops} against the base): the "
        "reward is being gamed. Look at the pictures in holdout/ and go back to an earlier checkpoint; then add the "
        "fallen score to rewards, raise kl_weight, lower learning_rate, or train less."
    )


def no_spread(curves: Curves, active: bool) -> str | None:
    """Pictures of one prompt are equally good to a judge: exactly, in most groups, or nearly, against the start."""
    recent = list(curves.rows)[-curves.window :]
    silent = _of_rollouts(recent, "group/silent")
    if len(recent) < curves.window or not silent:
        return None
    if fmean(silent) >= (SILENT / 2 if active else SILENT):
        seen = f"in {fmean(silent):.0%} of the groups every picture has the same reward"
    elif faded := _faded(curves, recent, 2 * FADED if active else FADED):
        told = ", ".join(f"{name} {share:.2g}" for name, share in faded.items())
        seen = f"rewards of one prompt hardly differ any more (their spread as a share of that at the start: {told})"
    else:
        return None
    return (
        f"{seen}, so nothing is learnt from them. Use larger groups, more noise_level, harder prompts, or a judge that "
        "tells pictures apart."
    )


def collapse(curves: Curves, active: bool) -> str | None:
    """Pictures of one prompt look more and more alike, compared with the first ones of the run."""
    rows = list(curves.rows)
    before, later = curves.start.get("group/diversity"), _of_rollouts(rows[-curves.window :], "group/diversity")
    if len(rows) < 2 * curves.window or before is None or not later:
        return None
    now = fmean(later)
    if now > (COLLAPSE * 1.2 if active else COLLAPSE) * before:
        return None
    return (
        f"pictures of one prompt differ by {now:.3g}, {now / before:.0%} of what they did at the start: the policy "
        "collapses onto a few. Raise kl_weight, lower learning_rate, or go back to an earlier checkpoint."
    )


GRPO_CHECKS = CHECKS | {check.__name__: check for check in (reward_hacking, no_spread, collapse)}


def _faded(curves: Curves, recent: Sequence[dict[str, float]], limit: float) -> dict[str, float]:
    """Rewards whose spread within a group is below ``limit`` of that at the start, and what is left of it.

    Raw scores tell more than win rates, which are as far apart for scores that all but agree.
    """
    found = {}
    for name in sorted(n for n in curves.start if n.startswith("reward/") and n.endswith("/spread_of_reward")):
        reward = name.removesuffix("/spread_of_reward")
        name = f"{reward}/score_spread" if f"{reward}/score_spread" in curves.start else name
        before, now = curves.start[name], _of_rollouts(recent, name)
        if before > 0 and now and fmean(now) < limit * before:
            found[reward.removeprefix("reward/")] = fmean(now) / before
    return found


def _of_rollouts(rows: Sequence[dict[str, float]], name: str) -> list[float]:
    """A rollout's number, which only the first of its updates carries."""
    return [row[name] for row in rows if math.isfinite(row.get(name, math.nan))]


def _sigmas(row: dict[str, float], name: str) -> float:
    """How many standard errors a hold-out score is away from the base's; 0 where it, or its error, is not known."""
    change, error = row.get(f"{name}_change", 0.0), row.get(f"{name}_error", math.inf)
    return change / error if error > 0 else math.copysign(math.inf, change) if change else 0.0

"""Alarms: known failures of preference training, recognised in its curves and told in plain words.

The loss is a poor witness: it can fall while images are ruined and look flat while they improve. What counts is how
the errors of winner and loser move against the reference. Limits are relative (to the reference's own error, to the
run's usual gradient, to the spread of the curve itself), so that they hold for any beta, resolution and batch size.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, variance
from typing import Any

# Chosen on 20 DPO runs of a small image model (beta 200 to 20000, learning rates 1e-6 to 1e-3, true and shuffled
# labels): every run whose samples left the data (distance to the nearest real image up by 17 % to 5 times) raises an
# alarm, none whose samples stayed (within 1 %) does. A winner's error up by 1 or 2 % is common and harmless.
WINNER_RISE = 0.05  # share of the reference's error
LOSER_RISE = 0.25
SATURATED = 0.05  # mean gradient factor; 1/2 where training starts
SATURATED_SHARE = 0.75  # of the window
SPIKE = 10.0  # times the usual gradient norm
SPIKE_SIGMAS = 6.0  # and as many robust standard deviations of its logarithm
LOSS_RISE = 1.1  # times the loss it began with
LONG = 4  # "nothing learnt" looks at this many windows
OVERFLOWS = 10  # gradients in a row that loss scaling may drop while it looks for its scale
SIGNIFICANT = 3.0  # standard errors


@dataclass(frozen=True)
class Alarm:
    """What an alarm says.

    Args:
        name: stable, for machines.
        message: what is seen, why it matters, what to do.
        step: optimizer steps done.
    """

    name: str
    message: str
    step: int

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


class Curves:
    """The last values of each metric, oldest first, and where each began.

    ``start`` has the mean of each over the first ``window`` steps, once these are over: a metric that falls slowly is
    never far below what it was a while ago.

    Args:
        window: optimizer steps that most alarms look back on; ``LONG`` times as many are kept.
        keep: keep at least as many.
    """

    def __init__(self, window: int, keep: int = 0) -> None:
        self.window = window
        self.rows: deque[dict[str, float]] = deque(maxlen=max(LONG * window, keep))
        self.first_loss: float | None = None
        self.start: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of one optimizer step."""
        self.rows.append(dict(metrics))
        if self.first_loss is None:
            self.first_loss = metrics.get("loss")
        if not self.start and len(self.rows) == self.window:
            names = {name for row in self.rows for name in row}
            found = {n: [row[n] for row in self.rows if math.isfinite(row.get(n, math.nan))] for n in sorted(names)}
            self.start = {name: fmean(values) for name, values in found.items() if values}

    def last(self, name: str, count: int | None = None) -> list[float]:
        """The values of the last ``count`` (or ``window``) steps; empty unless each has it and it is finite."""
        count = count or self.window
        if len(self.rows) < count:
            return []
        values = [row.get(name, math.nan) for row in list(self.rows)[-count:]]
        return values if all(map(math.isfinite, values)) else []


# A check gets the curves and whether its alarm is active already, and returns the message or None. An active alarm is
# held by a laxer condition than the one that raised it: curves flicker around any limit.
Check = Callable[[Curves, bool], "str | None"]


class HealthMonitor:
    """Watches the metrics of each optimizer step. An alarm is given once, and again only after it had cleared.

    It reads ``loss``, ``rewards/accuracies``, ``rewards/margins``, ``gradient_factor``, ``grad_norm``, the policy's
    errors ``error/winner`` and ``error/loser``, and their difference from the reference, ``error/winner_change`` and
    ``error/loser_change``. A method that has no such number has no such alarm.

    Args:
        window: optimizer steps an alarm looks back on.
        checks: alarms by name; None means those of this file, to which a method may add its own.
        keep: steps that some check of them looks back on, where those are many.
    """

    def __init__(self, window: int = 50, checks: Mapping[str, Check] | None = None, *, keep: int = 0) -> None:
        if window < 20:
            raise ValueError(f"window must be 20 steps or more, fewer say nothing; got {window}.")
        self.window, self.keep = window, keep
        self.checks = dict(CHECKS if checks is None else checks)
        self.fired: list[Alarm] = []
        self._curves = Curves(window, keep)
        self._quiet: dict[str, int] = {}  # active alarms, and for how many steps their cause has been gone

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        """Take in the metrics of an optimizer step.

        Args:
            step: optimizer steps done.
            metrics: means over the step by name; alarms whose names are missing stay silent.

        Returns:
            Alarms that are new at this step.
        """
        self._curves.add(metrics)
        new = []
        for name, check in self.checks.items():
            active = name in self._quiet
            message = check(self._curves, active)
            if message is None:
                self._rest(name)
                continue
            if not active:
                new.append(Alarm(name, message, step))
            self._quiet[name] = 0
        self.fired += new
        return new

    @property
    def active(self) -> list[str]:
        """Names of alarms that have not cleared."""
        return list(self._quiet)

    @property
    def raised(self) -> list[dict[str, Any]]:
        """Every alarm so far, for a JSON report."""
        return [asdict(alarm) for alarm in self.fired]

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later alarms; may be stored as JSON."""
        return {
            "rows": [dict(row) for row in self._curves.rows],
            "first_loss": self._curves.first_loss,
            "start": dict(self._curves.start),
            "quiet": dict(self._quiet),
            "fired": self.raised,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self._curves = Curves(self.window, self.keep)
        self._curves.rows.extend(state["rows"])
        self._curves.first_loss = state["first_loss"]
        self._curves.start = dict(state["start"])
        self._quiet = dict(state["quiet"])
        self.fired = [Alarm(**alarm) for alarm in state["fired"]]

    def _rest(self, name: str) -> None:
        """An alarm clears when its cause has been gone for half a window."""
        if name in self._quiet:
            self._quiet[name] += 1
            if self._quiet[name] >= self.window // 2:
                del self._quiet[name]


def not_finite(curves: Curves, active: bool) -> str | None:
    """A loss or error that is NaN or infinite, or gradients that overflow step after step."""
    latest = curves.rows[-1]
    bad = [name for name, value in latest.items() if name != "grad_norm" and not math.isfinite(value)]
    if bad:
        return (
            f"{', '.join(sorted(bad))} became NaN or infinite. The weights are, or are about to be, ruined. Stop, "
            "return to the last checkpoint, and lower learning_rate; under fp16 use bf16, or keep the VAE in fp32."
        )
    recent = [row.get("grad_norm", 0.0) for row in list(curves.rows)[-OVERFLOWS:]]
    if len(recent) == OVERFLOWS and not any(map(math.isfinite, recent)):
        return (
            f"the gradient has been NaN or infinite for {OVERFLOWS} steps in a row, so nothing is being learnt. A few "
            "are normal while fp16 looks for its loss scale, so many are not: use bf16, or lower learning_rate."
        )
    return None


def winner_error_rising(curves: Curves, active: bool) -> str | None:
    """Likelihood displacement: the policy gets worse at the preferred images too."""
    change, level = _change(curves, "winner")
    if not change or not _above(change, WINNER_RISE * level, active):
        return None
    return (
        f"the error on preferred images is {fmean(change) / level:.0%} above the reference's and rising (likelihood "
        "displacement). Pairs are won by unlearning the losers, and images will lose detail or break. Stop at an "
        "earlier checkpoint, lower learning_rate, or raise beta to hold the policy closer to the reference."
    )


def loser_runaway(curves: Curves, active: bool) -> str | None:
    """The loser's error grows without bound while the winner gains next to nothing."""
    loser, level = _change(curves, "loser")
    winner, _ = _change(curves, "winner")
    if not loser or not winner or not _above(loser, LOSER_RISE * level, active):
        return None
    gain = max(-fmean(winner), 0.0)
    if gain > 0.1 * fmean(loser):
        return None
    return (
        f"the error on rejected images is {fmean(loser) / level:.0%} above the reference's and rising, while preferred "
        f"images gained {gain / level:.1%}. The policy learns what to avoid, not what to make, which ends in noise. "
        "Lower learning_rate, raise beta, or stop at an earlier checkpoint."
    )


def saturation(curves: Curves, active: bool) -> str | None:
    """Nearly all pairs are told apart so surely that nothing pulls any more."""
    factors = curves.last("gradient_factor")
    if not factors:
        return None
    share = sum(factor < SATURATED for factor in factors) / len(factors)
    if share < (SATURATED_SHARE / 2 if active else SATURATED_SHARE):
        return None
    return (
        f"the gradient factor is {fmean(factors):.3f} (it starts at 0.5): nearly every pair is already told apart and "
        "adds nothing, and the few that are left dominate each step. Either the pairs are memorised (use more data or "
        "stop here), or beta is so high that tiny differences saturate (lower beta)."
    )


def nothing_learnt(curves: Curves, active: bool) -> str | None:
    """After many steps the policy tells winners from losers no better than a coin."""
    if not curves.last("error/winner_change"):
        return None  # without a reference the accuracy holds how hard the images are, and starts anywhere
    count = LONG * curves.window
    accuracy, margin = curves.last("rewards/accuracies", count), curves.last("rewards/margins", count)
    if not accuracy or not margin:
        return None
    if fmean(accuracy) > 0.5 + 2 * _error(accuracy) or fmean(margin) > 2 * _error(margin):
        return None
    return (
        f"over the last {count} steps the policy ranks {fmean(accuracy):.0%} of pairs correctly, a coin's share, with "
        f"a mean margin of {fmean(margin):.2g}. Nothing has been learnt. Check that winner and loser are not mixed up "
        "or shuffled in the data and that adapters are trained; then raise learning_rate or train longer."
    )


def loss_above_start(curves: Curves, active: bool) -> str | None:
    """The loss is higher than that of a policy that learnt nothing: some pairs are confidently wrong."""
    if not curves.last("error/winner_change"):
        return None  # without a reference the loss holds how hard the images are
    losses, margins, start = curves.last("loss"), curves.last("rewards/margins"), curves.first_loss
    if not losses or not margins or start is None or not math.isfinite(start):
        return None
    if fmean(losses) < (start if active else LOSS_RISE * start):
        return None
    if not active and fmean(losses) - start < SIGNIFICANT * _error(losses):
        return None
    return (
        f"the loss is {fmean(losses):.3g}, above the {start:.3g} it began with: the policy is sure of rankings that "
        "are wrong. It has left the reference faster than the data can steer it. Lower learning_rate or beta, use "
        "larger batches, and check the data for contradicting pairs."
    )


def gradient_spike(curves: Curves, active: bool) -> str | None:
    """One gradient far outside what this run has been used to."""
    norms = curves.last("grad_norm")
    if not norms or min(norms) <= 0:
        return None
    *before, latest = (math.log(norm) for norm in norms)
    usual = median(before)
    spread = 1.4826 * median(abs(value - usual) for value in before)
    if latest - usual < max(math.log(SPIKE), SPIKE_SIGMAS * spread):
        return None
    return (
        f"the gradient norm jumped to {norms[-1]:.3g}, {math.exp(latest - usual):.0f} times its usual size. Such "
        "spikes come before images turn to noise. Keep max_grad_norm at 1 or below, and lower learning_rate if they "
        "return; a damaged or duplicated row can cause one too."
    )


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        not_finite,
        winner_error_rising,
        loser_runaway,
        saturation,
        nothing_learnt,
        loss_above_start,
        gradient_spike,
    )
}


def _change(curves: Curves, side: str) -> tuple[list[float], float]:
    """Error of ``side`` minus the reference's over the window, and the reference's mean error."""
    change, error = curves.last(f"error/{side}_change"), curves.last(f"error/{side}")
    if not change or not error:
        return [], 0.0
    level = fmean(error) - fmean(change)
    return (change, level) if level > 0 else ([], 0.0)


def _above(change: Sequence[float], limit: float, active: bool) -> bool:
    """Whether a change is above its limit and still rising; once active, whether it stays above half the limit."""
    return fmean(change) >= limit / 2 if active else fmean(change) >= limit and _rising(change)


def _rising(values: Sequence[float]) -> bool:
    """The later half is above the earlier one by more than their noise."""
    half = len(values) // 2
    early, late = values[:half], values[-half:]
    return fmean(late) - fmean(early) > 2 * math.hypot(_error(early), _error(late))


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; steps see different rows, so they count as independent."""
    return math.sqrt(variance(values) / len(values))

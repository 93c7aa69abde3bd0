"""Rewards of groups, found in the background while the next group is drawn."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from reward_models import PairwiseRewardModel, RewardModel, can_score

from ...errors import ConfigError, RewardError
from .win_rate import Ask, Pair, ask_scores, win_rates

if TYPE_CHECKING:
    from ..config import PrefGRPOConfig

log = logging.getLogger(__name__)
Model = RewardModel | PairwiseRewardModel
T = TypeVar("T")
RETRY_SECONDS = 5.0
#: Rollouts in a row without any answer after which a model is asked again. Once may be a hiccup, or prompts that it has
#: nothing to say about; a judge that is silent for good would let a run learn nothing for days.
SILENT_IN_A_ROW = 2
#: The same for a model that answers other processes: it is not gone, but these groups are never learnt from.
SILENT_ALONE = 3


def labels(models: Sequence[Model]) -> list[str]:
    """The models' names in metrics; of several with one name, each but the first gets its number: clip, clip-2."""
    names = [model.name for model in models]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}-{count}" for name, count in zip(names, counts, strict=True)]


@dataclass
class GroupReward:
    """What one reward model says of one group.

    Args:
        reward: (G,) fp64, NaN where missing.
        stats: of the judge, see :class:`.win_rate.Judgements`; ``score`` and ``spread`` are those of raw scores.
        seconds: that it took.
        timed_out: nothing came in time.
    """

    reward: Tensor
    stats: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    timed_out: bool = False


#: Prompt, pictures and one future per model, by group.
Work: TypeAlias = dict[int, tuple[str, list[Image.Image], list[Future[GroupReward]]]]


class RewardDesk:
    """Asks every reward model about every group, each model in a thread of its own and in the order of groups.

    Args:
        models: pointwise scorers or judges.
        config: settings of the run.

    Raises:
        ConfigError: a model that cannot do what ``reward`` asks, or a ``tie_margin`` without scores to compare.
    """

    def __init__(self, models: Sequence[Model], config: PrefGRPOConfig) -> None:
        self.models, self.config = list(models), config
        if config.reward == "score" and (deaf := [m.name for m in models if not can_score(m)]):
            raise ConfigError(f"{', '.join(deaf)} only compares pictures: use reward=win_rate.")
        if config.tie_margin and models and all(isinstance(model, PairwiseRewardModel) for model in models):
            raise ConfigError(
                f"tie_margin={config.tie_margin} has no effect: it is a difference of scores, and "
                f"{', '.join(labels(models))} compares pictures in pairs. Leave it out."
            )
        self.names = labels(models)
        self.lines = [Line(name) for name in self.names]
        self.silent = [0] * len(self.models)  # rollouts in a row in which a model answered nothing
        self.failures = [_failures(model) for model in self.models]  # up to the last rollout

    def submit(self, group: int, prompt: str, images: list[Image.Image]) -> list[Future[GroupReward]]:
        """Have a group judged; returns one future per model."""
        return [self._hand_in(number, group, prompt, images) for number in range(len(self.models))]

    def _hand_in(self, number: int, group: int, prompt: str, images: list[Image.Image]) -> Future[GroupReward]:
        return self.lines[number].submit(lambda: self.judge(self.models[number], group, prompt, images))

    def judge(self, model: Model, group: int, prompt: str, images: list[Image.Image]) -> GroupReward:
        """One model on one group, now."""
        config, began, before = self.config, time.monotonic(), _own_counts(model)
        stats: dict[str, float] = {}
        if isinstance(model, PairwiseRewardModel) and config.reward == "win_rate":
            ask = _ask_judge(model, images, prompt)
        else:
            assert isinstance(model, RewardModel)
            scores = model.score(images, [prompt] * len(images)).double()
            stats = _score_stats(scores)
            if config.reward == "score":
                stats |= _own_stats(before, _own_counts(model))
                return GroupReward(scores, stats, time.monotonic() - began)
            ask = ask_scores(scores, config.tie_margin)
        out = win_rates(
            ask,
            len(images),
            *(config.seed, group),
            schedule=config.pairing,
            opponents=config.opponents,
            both_orders=config.both_orders,
        )
        stats = out.stats | stats | _own_stats(before, _own_counts(model))
        return GroupReward(out.win_rate, stats, time.monotonic() - began)

    def collect(self, work: Work) -> Collected:
        """Wait for the rewards of groups.

        A group that is late is missing, and nobody is asked about it any more. A model that fails on everything, or is
        silent or late ``SILENT_IN_A_ROW`` times, is asked again until it answers or ``judge_patience`` is over.

        Args:
            work: the groups.
        """
        deadline = time.monotonic() + self.config.reward_timeout
        found: dict[int, list[GroupReward]] = {group: [] for group in work}
        down: dict[str, Silence] = {}
        for number, name in enumerate(self.names):
            futures = {group: entry[2][number] for group, entry in work.items()}
            results, errors = self._await(number, work, futures, deadline)
            if work and _silent(results):
                self.silent[number] += 1
                reason = self._reason(number, errors, results)
                if not errors and self.silent[number] < SILENT_IN_A_ROW:
                    log.warning("%s: %s.", name, reason)
                elif (again := self._insist(number, work, reason)) is None:
                    down[name] = Silence(reason, self.silent[number])
                else:
                    results, self.silent[number] = again, 0
            elif work:
                self.silent[number] = 0
                if errors:
                    log.warning("%s failed on %d of %d groups: %s", name, len(errors), len(work), errors[-1])
            self.failures[number] = _failures(self.models[number])
            for group in work:
                found[group].append(results[group])
        return Collected(found, down)

    def _await(
        self, number: int, work: Work, futures: dict[int, Future[GroupReward]], deadline: float
    ) -> tuple[dict[int, GroupReward], list[Exception]]:
        """One model's rewards of each group, NaN where it failed or is late, and what it raised."""
        results: dict[int, GroupReward] = {}
        errors: list[Exception] = []
        for group, future in futures.items():
            images = work[group][1]
            if not wait([future], max(0.0, deadline - time.monotonic())).done:
                future.cancel()
                self.lines[number].abandon()
                results[group] = _nothing(images, timed_out=True)
                continue
            try:
                results[group] = future.result()
            except Exception as error:  # noqa: BLE001 (whatever a reward model raises, TimeoutError too)
                errors.append(error)
                results[group] = _nothing(images)
        return results, errors

    def _insist(self, number: int, work: Work, reason: str) -> dict[int, GroupReward] | None:
        """Ask a silent model again and again; None when ``judge_patience`` is over. It may hang here too."""
        name, patience = self.names[number], self.config.judge_patience
        until = time.monotonic() + patience
        while (left := until - time.monotonic()) > 0:
            log.warning(
                "the reward model %s has stopped answering (%s). Training waits for it, %.0f s more.",
                name,
                reason,
                left,
            )
            time.sleep(min(RETRY_SECONDS, patience / 4))
            futures = {
                group: self._hand_in(number, group, prompt, images) for group, (prompt, images, _) in work.items()
            }
            results, errors = self._await(number, work, futures, time.monotonic() + self.config.reward_timeout)
            if not _silent(results):
                log.warning("%s answers again; training goes on.", name)
                return results
            reason = self._reason(number, errors, results)
        return None

    def _reason(self, number: int, errors: Sequence[Exception], results: dict[int, GroupReward]) -> str:
        if errors:
            return str(errors[-1])
        if any(result.timed_out for result in results.values()):
            return f"it answered about no group within reward_timeout={self.config.reward_timeout:g} seconds"
        new = (_failures(self.models[number]) - self.failures[number]).most_common(1)
        return "it gave no usable answer to any group" + "".join(f" ({problem}, {n} times)" for problem, n in new)


@dataclass(frozen=True)
class Silence:
    """Why a model answers nothing at all, and for how many rollouts in a row it has not."""

    reason: str
    rollouts: int


@dataclass
class Collected:
    """Rewards of groups, one per model, and the models that answer nothing at all."""

    rewards: dict[int, list[GroupReward]]
    down: dict[str, Silence]


def down_for_good(reports: Sequence[dict[str, Silence]]) -> dict[str, str]:
    """Models without which training must not go on, and why.

    A process whose few prompts a judge will not speak about must not end the run. So those count that answer nobody, or
    that have been silent to some process ``SILENT_ALONE`` times in a row: its own server may be dead.

    Args:
        reports: ``down`` of each process that asked about something.
    """
    names = dict.fromkeys(name for report in reports for name in report)
    told = {name: [report[name] for report in reports if name in report] for name in names}
    return {
        name: silences[0].reason
        for name, silences in told.items()
        if len(silences) == len(reports) or any(silence.rollouts >= SILENT_ALONE for silence in silences)
    }


def judge_is_down(down: dict[str, str], checkpoint: object) -> RewardError:
    """The error that pauses a run."""
    told = "; ".join(f"{name}: {reason}" for name, reason in sorted(down.items()))
    return RewardError(
        f"training is paused: {told}. {checkpoint} holds everything up to here. Start the reward model again and "
        "continue with resume=latest."
    )


def _ask_judge(judge: PairwiseRewardModel, images: list[Image.Image], prompt: str) -> Ask:
    def ask(pairs: list[Pair]) -> Tensor:
        return judge.compare([(images[i], images[j]) for i, j in pairs], [prompt] * len(pairs))

    return ask


def _score_stats(scores: Tensor) -> dict[str, float]:
    found = scores[~scores.isnan()]
    stats = {"calls": float(len(scores)), "missing": 1 - len(found) / len(scores)}
    if len(found):
        stats |= {"score": float(found.mean()), "score_spread": float(found.std(correction=0))}
    return stats


def _failures(model: Model) -> Counter[str]:
    """Reasons for which a judge that keeps count had no usable answer so far."""
    return Counter(getattr(getattr(model, "statistics", None), "failures", {}))


def _own_counts(model: Model) -> dict[str, float]:
    """What a judge has counted of itself so far, as ``reward_models.unified_reward`` does; {} where it does not."""
    book: Any = getattr(model, "statistics", None)
    names = ("answers", "asked_again", "judged", "reversed", "lean")
    if not all(hasattr(book, name) for name in (*names, "failures")):
        return {}
    return {name: float(getattr(book, name)) for name in names} | {"failures": float(sum(book.failures.values()))}


def _own_stats(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What a judge that asks both orders by itself saw in between; outside, each of its pairs is one answer."""
    if not after:
        return {}
    change = {name: value - before[name] for name, value in after.items()}
    stats = {"questions": change["answers"] + change["asked_again"]}
    if change["answers"]:
        stats["unusable"] = change["failures"] / change["answers"]
    if change["judged"]:
        stats["disagreement"] = change["reversed"] / change["judged"]
        stats["first_wins"] = (1 + change["lean"] / change["judged"]) / 2
    return stats


def _silent(results: dict[int, GroupReward]) -> bool:
    return all(bool(torch.isnan(result.reward).all()) for result in results.values())


def _nothing(images: list[Image.Image], *, timed_out: bool = False) -> GroupReward:
    empty = torch.full((len(images),), float("nan"), dtype=torch.float64)
    return GroupReward(empty, {"missing": 1.0}, timed_out=timed_out)


class Line:
    """Jobs of one model, one after another in a thread that never keeps the program from ending."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self.jobs.put((job, future))
        return future

    def ask(self, job: Callable[[], T], timeout: float) -> T:
        """What a job returns.

        Raises:
            TimeoutError: nothing within so many seconds; the job is left to its thread.
        """
        future = self.submit(job)
        if not wait([future], timeout).done:
            future.cancel()
            self.abandon()
            raise TimeoutError(f"no answer within {timeout:g} seconds")
        return future.result()

    def abandon(self) -> None:
        """Leave a job that hangs to its thread, which then ends; later jobs get a new one."""
        if self.jobs.unfinished_tasks:
            self.jobs.put(None)
            self._open()

    def _open(self) -> None:
        self.jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        threading.Thread(target=self._run, args=(self.jobs,), name=f"reward {self.name}", daemon=True).start()

    @staticmethod
    def _run(jobs: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None]) -> None:
        while (entry := jobs.get()) is not None:
            job, future = entry
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except Exception as error:  # noqa: BLE001 (raised again where the result is asked for)
                    future.set_exception(error)
            jobs.task_done()

"""Rewards of groups, found in the background while the next group is drawn."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from reward_models import PairwiseRewardModel, RewardModel, load_reward_model

from ...errors import ConfigError, RewardError
from .win_rate import Ask, Pair, ask_scores, win_rates

if TYPE_CHECKING:
    from ..config import PrefGRPOConfig

log = logging.getLogger(__name__)
Model = RewardModel | PairwiseRewardModel
RETRY_SECONDS = 5.0


def load_rewards(names: Sequence[str]) -> list[Model]:
    """Reward models by name; options are written ``name?option=value&option=value``, values as in YAML.

    Raises:
        RewardModelError: no such model or option.
        ConfigError: an option that is not ``key=value``.
    """
    models: list[Model] = []
    for entry in names:
        name, _, text = entry.partition("?")
        options = {}
        for part in text.split("&") if text else ():
            key, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(f"expected name?option=value&option=value, got {entry!r}.")
            options[key] = yaml.safe_load(value)
        models.append(load_reward_model(name, **options))
    return models


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


class RewardDesk:
    """Asks every reward model about every group, each model in a thread of its own and in the order of groups.

    Args:
        models: pointwise scorers or judges.
        config: settings of the run.

    Raises:
        ConfigError: a model that cannot do what ``reward`` asks.
    """

    def __init__(self, models: Sequence[Model], config: PrefGRPOConfig) -> None:
        self.models, self.config = list(models), config
        if config.reward == "score" and (deaf := [m.name for m in models if not isinstance(m, RewardModel)]):
            raise ConfigError(f"{', '.join(deaf)} only compares pictures: use reward=win_rate.")
        self.lines = [_Line(model.name) for model in self.models]

    def submit(self, group: int, prompt: str, images: list[Image.Image]) -> list[Future[GroupReward]]:
        """Have a group judged; returns one future per model."""
        return [
            line.submit(lambda model=model: self.judge(model, group, prompt, images))
            for line, model in zip(self.lines, self.models, strict=True)
        ]

    def judge(self, model: Model, group: int, prompt: str, images: list[Image.Image]) -> GroupReward:
        """One model on one group, now."""
        config, began = self.config, time.monotonic()
        stats: dict[str, float] = {}
        if isinstance(model, PairwiseRewardModel) and config.reward == "win_rate":
            ask = _ask_judge(model, images, prompt)
        else:
            assert isinstance(model, RewardModel)
            scores = model.score(images, [prompt] * len(images)).double()
            stats = _score_stats(scores)
            if config.reward == "score":
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
        return GroupReward(out.win_rate, out.stats | stats, time.monotonic() - began)

    def collect(self, work: dict[int, tuple[str, list[Image.Image], list[Future[GroupReward]]]]) -> Collected:
        """Wait for the rewards of groups.

        A group that is late is missing. A model that fails on everything is asked again until it answers or
        ``judge_patience`` is over.

        Args:
            work: prompt, pictures and futures of each group.
        """
        deadline = time.monotonic() + self.config.reward_timeout
        found: dict[int, list[GroupReward]] = {group: [] for group in work}
        down: list[str] = []
        for number, model in enumerate(self.models):
            results: dict[int, GroupReward] = {}
            errors: list[Exception] = []
            for group, (_, images, futures) in work.items():
                try:
                    results[group] = futures[number].result(max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    self.lines[number].abandon()
                    results[group] = _nothing(images, timed_out=True)
                except Exception as error:  # noqa: BLE001 (whatever a reward model raises)
                    errors.append(error)
                    results[group] = _nothing(images)
            if work and _silent(results) and not any(r.timed_out for r in results.values()):
                reason = str(errors[-1]) if errors else "it gave no usable answer to any group"
                if (again := self._insist(model, work, reason)) is None:
                    down.append(f"{model.name}: {reason}")
                else:
                    results = again
            elif errors:
                log.warning("%s failed on %d of %d groups: %s", model.name, len(errors), len(work), errors[-1])
            for group in work:
                found[group].append(results[group])
        return Collected(found, down)

    def _insist(self, model: Model, work: dict[int, Any], reason: str) -> dict[int, GroupReward] | None:
        until = time.monotonic() + self.config.judge_patience
        while time.monotonic() < until:
            log.warning(
                "the reward model %s has stopped answering (%s). Training waits for it, %.0f s more.",
                model.name,
                reason,
                until - time.monotonic(),
            )
            time.sleep(min(RETRY_SECONDS, self.config.judge_patience / 4))
            try:
                results = {g: self.judge(model, g, prompt, images) for g, (prompt, images, _) in work.items()}
            except Exception as error:  # noqa: BLE001
                reason = str(error)
                continue
            if not _silent(results):
                log.warning("%s answers again; training goes on.", model.name)
                return results
        return None


@dataclass
class Collected:
    """Rewards of groups, one per model; ``down`` names models that answer nothing at all."""

    rewards: dict[int, list[GroupReward]]
    down: list[str]


def judge_is_down(down: Sequence[str], checkpoint: object) -> RewardError:
    """The error that pauses a run."""
    return RewardError(
        f"training is paused: {'; '.join(down)}. {checkpoint} holds everything up to here. Start the reward model "
        "again and continue with resume=latest."
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


def _silent(results: dict[int, GroupReward]) -> bool:
    return all(bool(torch.isnan(result.reward).all()) for result in results.values())


def _nothing(images: list[Image.Image], *, timed_out: bool = False) -> GroupReward:
    empty = torch.full((len(images),), float("nan"), dtype=torch.float64)
    return GroupReward(empty, {"missing": 1.0}, timed_out=timed_out)


class _Line:
    """Jobs of one model, one after another in a thread that never keeps the program from ending."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._open()

    def submit(self, job: Any) -> Future[GroupReward]:
        future: Future[GroupReward] = Future()
        self.jobs.put((job, future))
        return future

    def abandon(self) -> None:
        """Leave a job that hangs, and all behind it, to their thread; later jobs get a new one."""
        if self.jobs.unfinished_tasks:
            self._open()

    def _open(self) -> None:
        self.jobs: queue.Queue[tuple[Any, Future[GroupReward]]] = queue.Queue()
        threading.Thread(target=self._run, args=(self.jobs,), name=f"reward {self.name}", daemon=True).start()

    @staticmethod
    def _run(jobs: queue.Queue[tuple[Any, Future[GroupReward]]]) -> None:
        while True:
            job, future = jobs.get()
            try:
                future.set_result(job())
            except Exception as error:  # noqa: BLE001 (raised again where the result is asked for)
                future.set_exception(error)
            jobs.task_done()

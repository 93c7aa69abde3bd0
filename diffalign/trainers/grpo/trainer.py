"""Pref-GRPO: draw groups of pictures with the policy, have them judged, raise the density of what was better.

An iteration is one rollout and ``updates_per_rollout`` optimizer steps. Everything random in it is keyed by (run seed,
group, place in the group), and a checkpoint in its middle keeps the rollout, so a run may be killed anywhere.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from reward_models import load_reward_model

from ...errors import CheckpointError, ConfigError, RewardError
from ...evaluation.prompts import read_prompts
from ...objectives import LossOutput, combined_advantages, grpo_loss
from ...objectives.advantages import check_groups
from ...randomness import keyed_permutation
from ..config import PrefGRPOConfig
from ..health import HealthMonitor
from ..metrics import MetricAccumulator
from ..prompt_loop import PromptLoop
from ..prompts import Prompts
from ..reference import weights_hash
from .alarms import GRPO_CHECKS, IN_A_ROW
from .holdout import Holdout, diversity
from .objectives import MatchingObjective, Objective, StepObjective
from .record import REPLAYED, Rollout, judge_metrics
from .rewards import Model, RewardDesk, Work, down_for_good, judge_is_down
from .rollouts import Chunk, Sample, Sampling, Told

log = logging.getLogger(__name__)
_DECODE_PIXELS = 2**21  # decoded at once
PER_TERM = ("ratio", "clip_share", "kl", "error")


class PrefGRPOTrainer(PromptLoop):
    """Trains on the policy's own pictures with :func:`diffalign.objectives.grpo_loss` (Pref-GRPO, arXiv:2508.20751).

    Args:
        pipeline, config, accelerator, base_model: see :class:`..loop.TrainingLoop`.
        train_dataset: prompts, or what :func:`diffalign.trainers.prompts.load_prompts` accepts.
        reward_models: ready models in place of ``config.rewards``.
        holdout_models: ready models in place of ``config.holdout_rewards``.

    Raises:
        ConfigError: settings that contradict each other, the pipeline or the number of processes.
        DataError: no prompts.
        CheckpointError: ``output_dir`` holds another run and ``resume`` is ``none``.
    """

    method = "prefgrpo"
    config_class = PrefGRPOConfig
    config: PrefGRPOConfig

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        config: PrefGRPOConfig,
        train_dataset: Prompts | Any,
        accelerator: Accelerator | None = None,
        *,
        base_model: str | None = None,
        reward_models: Sequence[Model] = (),
        holdout_models: Sequence[Model] = (),
    ) -> None:
        super().__init__(pipeline, config, train_dataset, accelerator, base_model=base_model)
        self.rewards = self._models(reward_models, config.rewards, "rewards")
        self.weights = torch.tensor(config.reward_weights or [1.0] * len(self.rewards), dtype=torch.float64)
        if not self.rewards or len(self.weights) != len(self.rewards):
            raise ConfigError(
                f"rewards must name at least one model, and reward_weights one weight for each; got "
                f"{len(self.rewards)} models and {len(self.weights)} weights."
            )
        self.unseen = self._models(holdout_models, config.holdout_rewards, "holdout_rewards")
        self.desk = RewardDesk(self.rewards, config)
        self._divide()
        holdout = config.holdout_prompts
        self.holdout_texts = read_prompts(holdout, limit=config.holdout_count) if holdout else []
        self.encode([*self._prompts_ahead(), *self.holdout_texts])
        if self.pipeline.vae is None:
            raise ConfigError("pictures cannot be decoded without a VAE: load the whole pipeline.")
        self.pipeline.vae.to(self.accelerator.device)  # the one encoder that every iteration needs
        self.sampling = Sampling(self.adapter, self.schedule, self.encoded, config, self.accelerator)
        self.objective: Objective = StepObjective(self.sampling)
        if config.objective == "matching":
            self.objective = MatchingObjective(self.sampling, self.schedule)
        self.build_policy()
        self.base = self.reference.identity if self.reference else weights_hash(self.denoiser, skip="lora_")
        self.start(self._total_steps())
        self.metrics = MetricAccumulator(*self.objective.metrics, bucketed=PER_TERM)
        self.health = HealthMonitor(checks=GRPO_CHECKS, keep=IN_A_ROW * (config.holdout_every or 0))
        self.rollout: Rollout | None = None
        self.holdout: Holdout | None = None

    @staticmethod
    def _models(ready: Sequence[Model], names: list[str], setting: str) -> list[Model]:
        if ready and names:
            raise ConfigError(f"{setting}={names} has no effect beside ready models: give one of the two.")
        return list(ready) or [load_reward_model(name) for name in names]

    def _divide(self) -> None:
        """Which pictures of an iteration are this process's: of each update's block its part of whole chunks."""
        config, processes = self.config, self.accelerator.num_processes
        self.count = config.prompts_per_rollout * config.group_size
        unit = config.updates_per_rollout * processes * config.batch_size
        if self.count % unit:
            raise ConfigError(
                f"prompts_per_rollout x group_size = {self.count} pictures cannot be divided into updates_per_rollout "
                f"{config.updates_per_rollout} x {processes} processes x batch_size {config.batch_size}: choose "
                f"numbers so that {unit} divides them."
            )
        self.global_batch = self.count // config.updates_per_rollout
        share = self.global_batch // processes
        self.owner = [n % self.global_batch // share for n in range(self.count)]
        self.mine = [n for n, process in enumerate(self.owner) if process == self.accelerator.process_index]

    def _total_steps(self) -> int:
        config = self.config
        iterations = (config.max_epochs or 0) * len(self.dataset) / config.prompts_per_rollout
        return config.max_steps or math.ceil(iterations) * config.updates_per_rollout

    def _prompts_ahead(self) -> list[str]:
        """The prompts that the run will draw; of a long list a short run sees a part."""
        iterations = -(-self._total_steps() // self.config.updates_per_rollout)
        groups = min(iterations * self.config.prompts_per_rollout, len(self.dataset))
        return [self._prompt(group) for group in range(groups)]

    # --- the loop's hooks ----------------------------------------------------------------------------------------

    def data_report(self) -> dict[str, Any]:
        names = [model.name for model in self.rewards]
        return super().data_report() | {"group_size": self.config.group_size, "rewards": names}

    def _identity(self) -> dict[str, Any]:
        """The base is named with a pull to it or without: ``kl_weight``, like ``rewards``, may change on resuming."""
        config = self.config
        groups = [config.prompts_per_rollout, config.group_size, config.updates_per_rollout]
        return super()._identity() | {"reference": self.base, "groups": groups}

    def state_dict(self) -> dict[str, Any]:
        return {"rewards": [model.identity for model in self.rewards]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state != self.state_dict():
            log.warning("other rewards than before: %s; now %s.", state.get("rewards"), self.state_dict()["rewards"])

    def optimizer_step(self) -> dict[str, float]:
        """One update of the weights; draws and judges a new rollout where the last one is used up."""
        began = time.monotonic()
        self._prepare_holdout()
        number = self.step % self.config.updates_per_rollout
        if number == 0 or self.rollout is None:
            self.rollout = None  # makes room for the next one
            self.rollout = self.roll_out(self.step // self.config.updates_per_rollout)
        rollout, drawn = self.rollout, time.monotonic()
        part = len(rollout.chunks) // self.config.updates_per_rollout
        chunks = rollout.chunks[number * part : (number + 1) * part]
        losses = self._backward(rollout, chunks, number)
        self.require_finite(losses)
        applied = self.apply_gradients()
        ended = time.monotonic()
        metrics = self.metrics.reduce(self.accelerator) | applied
        metrics |= {"time/training": ended - drawn, "time/step": ended - began}
        if number == 0:
            metrics |= rollout.metrics | self._cost_of_judging(rollout.metrics, ended - began)
        return metrics | self._measure_holdout()

    # --- rollout -------------------------------------------------------------------------------------------------

    def sample_of(self, iteration: int, n: int) -> Sample:
        """Picture ``n`` of an iteration: prompts come in keyed permutations, one after another."""
        group = iteration * self.config.prompts_per_rollout + n // self.config.group_size
        return Sample(self._prompt(group), group, n % self.config.group_size)

    def _prompt(self, group: int) -> str:
        epoch, place = divmod(group, len(self.dataset))
        return self.dataset.texts[_order(len(self.dataset), self.config.seed, epoch)[place]]

    def roll_out(self, iteration: int) -> Rollout:
        """Draw and judge the groups of an iteration; rewards are found while later pictures are drawn.

        Raises:
            RewardError: a reward model stays silent; a checkpoint is written first.
        """
        began, size = time.monotonic(), self.config.batch_size
        plan = self.sampling.plan(iteration)
        pictures: dict[int, Image.Image] = {}
        work: Work = {}
        chunks = []
        for number, samples in enumerate(self._chunks(iteration)):
            chunk, latents = self.sampling.draw(self.model, samples, plan)
            self.objective.remember(self.model, chunk, latents, plan)
            chunks.append(chunk)
            numbers = self.mine[number * size : (number + 1) * size]
            pictures |= dict(zip(numbers, self._decode(latents), strict=True))
            self._submit(iteration, pictures, work)
        self._submit(iteration, self._exchange(pictures), work)
        drawn = time.monotonic()
        rewards, metrics = self._collect(iteration, work)
        advantages = self._advantages(iteration, rewards)
        metrics |= self._group_metrics(advantages, work)
        metrics |= {"time/sampling": drawn - began, "time/waiting_for_rewards": time.monotonic() - drawn}
        return Rollout(plan, chunks, advantages, metrics)

    def _chunks(self, iteration: int) -> list[list[Sample]]:
        """This process's pictures of an iteration, those that are drawn together side by side."""
        size = self.config.batch_size
        return [
            [self.sample_of(iteration, n) for n in self.mine[start : start + size]]
            for start in range(0, len(self.mine), size)
        ]

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        at_once = max(1, _DECODE_PIXELS // self.sampling.edge**2)
        return [image for part in latents.split(at_once) for image in self.adapter.decode(part)]

    def _submit(self, iteration: int, pictures: dict[int, Image.Image], work: Work) -> None:
        """Hand in the groups that are complete and whose first picture is this process's."""
        size = self.config.group_size
        for first in range(0, self.count, size):
            sample = self.sample_of(iteration, first)
            members = range(first, first + size)
            if sample.group in work or self.owner[first] != self.accelerator.process_index:
                continue
            if all(n in pictures for n in members):
                images = [pictures[n] for n in members]
                work[sample.group] = (sample.prompt, images, self.desk.submit(sample.group, sample.prompt, images))

    def _exchange(self, pictures: dict[int, Image.Image]) -> dict[int, Image.Image]:
        """This process's pictures, and those of others that are in groups with them."""
        size = self.config.group_size
        spread = {n for n in range(self.count) if len({self.owner[m] for m in _group(n, size)}) > 1}
        if not spread:
            return pictures
        gathered = gather_object([(n, image) for n, image in pictures.items() if n in spread])
        return pictures | dict(gathered)

    def _collect(self, iteration: int, work: Work) -> tuple[Tensor, dict[str, float]]:
        """Rewards (N, R) fp64 of all pictures on every process, and what the judges did."""
        collected = self.desk.collect(work)
        size, first = self.config.group_size, iteration * self.config.prompts_per_rollout
        found = [(group, rewards) for group, rewards in collected.rewards.items()]
        reports = [collected.down] if work else []
        if self.accelerator.num_processes > 1:
            found, reports = gather_object(found), gather_object(reports)
        if down := down_for_good(reports):
            raise self._pause(down)
        rewards = torch.full((self.count, len(self.rewards)), float("nan"), dtype=torch.float64)
        for group, results in found:
            place = (group - first) * size
            for column, result in enumerate(results):
                rewards[place : place + size, column] = result.reward
        columns = [results for _, results in sorted(found, key=lambda item: item[0])]
        return rewards, judge_metrics(self.desk.names, columns)

    def _pause(self, down: dict[str, str]) -> RewardError:
        return judge_is_down(down, self.save_checkpoint())

    def _advantages(self, iteration: int, rewards: Tensor) -> Tensor:
        config = self.config
        groups = torch.tensor([self.sample_of(iteration, n).group for n in range(self.count)], dtype=torch.int64)
        check_groups(groups, config.group_size)
        default = "fixed" if config.reward == "win_rate" else "group"
        return combined_advantages(
            rewards,
            groups,
            self.weights,
            scale=default if config.advantage_scale == "default" else config.advantage_scale,
            clip=config.advantage_clip,
            min_spread=config.min_spread,
        )

    # --- update --------------------------------------------------------------------------------------------------

    def _backward(self, rollout: Rollout, chunks: list[Chunk], number: int) -> list[tuple[list[str], Tensor]]:
        """Gradients of one update: the mean over its pictures and their terms."""
        indices, processes = self.objective.indices(rollout.plan), self.accelerator.num_processes
        scale = processes / (self.global_batch * len(indices))
        work = [(chunk, index) for chunk in chunks for index in indices]
        losses = []
        told: Told | None = None
        for place, (chunk, index) in enumerate(work):
            if index == indices[0]:
                told = self.objective.conditioning(chunk, self.accelerator.device)
            assert told is not None
            last = place == len(work) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                out, places = self._term_loss(rollout, chunk, index, told)
                self.accelerator.backward(out.loss.sum() * scale)
            if number == 0:
                self._require_unit_ratio(out, chunk, index)
            self.metrics.add({"loss": out.loss.detach(), **out.stats}, places)
            losses.append(([sample.prompt for sample in chunk.samples], out.loss.detach()))
        return losses

    def _term_loss(self, rollout: Rollout, chunk: Chunk, index: int, told: Told) -> tuple[LossOutput, Tensor]:
        """The loss (N,) of one term of a chunk, from a forward pass at what was kept; and the terms' places."""
        config, moment = self.config, chunk.moments[index]
        term = self.objective.term(rollout.plan, chunk, index, told)
        prediction = term.predict(self.model)
        log_prob, normalise = term.log_density(prediction)
        kl = None
        if self.reference is not None:
            with torch.no_grad(), self.reference.use(self.model) as module:
                reference = term.predict(module)
            kl = term.kl(prediction, reference)
        places = [self._place(sample) for sample in chunk.samples]
        out = grpo_loss(
            log_prob,
            moment.log_prob,
            rollout.advantages[places].to(moment.log_prob.device),
            clip_range=config.clip_range,
            normalise=normalise,
            kl=kl,
            kl_weight=config.kl_weight,
        )
        return LossOutput(out.loss, out.stats | term.stats(log_prob.detach())), term.places

    def _place(self, sample: Sample) -> int:
        return sample.group % self.config.prompts_per_rollout * self.config.group_size + sample.member

    def _require_unit_ratio(self, out: LossOutput, chunk: Chunk, index: int) -> None:
        """Before the weights move, the replay must find the densities of the rollout; NaN is ``require_finite``'s.

        Raises:
            ConfigError: it does not; what is trained on is then not what was drawn.
        """
        worst = float(out.stats["log_ratio"].abs().max())
        if worst > self.config.clip_range / 2:
            raise ConfigError(
                f"term {index} of {chunk.samples[0].prompt!r}: the log-ratio is {worst:.2g} before any update, but "
                "must be 0. The replay sees something else than the rollout: dropout, another attention kernel, other "
                "conditioning, or an operation that is not deterministic. Try attention=eager, mixed_precision=no or "
                "latent_dtype=fp32."
            )

    # --- metrics -------------------------------------------------------------------------------------------------

    def _group_metrics(self, advantages: Tensor, work: Work) -> dict[str, float]:
        size = self.config.group_size
        silent = [float(bool((part == 0).all())) for part in advantages.split(size)]
        spread = [(group, diversity(images)) for group, (_, images, _) in work.items()]
        if self.accelerator.num_processes > 1:
            spread = gather_object(spread)
        distances = [distance for _, distance in sorted(spread)]
        return {
            "group/silent": math.fsum(silent) / len(silent),
            "group/diversity": math.fsum(distances) / len(distances),
            "group/largest_advantage": float(advantages.abs().max()),
        }

    def _cost_of_judging(self, told: dict[str, float], seconds: float) -> dict[str, float]:
        """What was asked for one update, and the judges' time as a share of the step that drew the rollout."""
        calls = [told.get(f"reward/{name}/calls", 0.0) for name in self.desk.names]
        judging = math.fsum(told[f"time/{name}"] for name in self.desk.names) / self.accelerator.num_processes
        return {
            "reward/calls_per_update": math.fsum(calls) / self.config.updates_per_rollout,
            "time/judging_share": judging / seconds,
        }

    def _prepare_holdout(self) -> None:
        """Before the first step of this process: the base's hold-out pictures, drawn or read back."""
        if self.config.holdout_every is None or self.holdout is not None or not self.accelerator.is_main_process:
            return
        self.holdout = Holdout(
            self.adapter,
            self.holdout_texts,
            self.encoded,
            self.config,
            self.output_dir / "holdout",
            self.accelerator,
            training=self.rewards,
            unseen=self.unseen,
        )
        self.holdout.prepare(self.denoiser, resumed=self.step > 0)

    def _measure_holdout(self) -> dict[str, float]:
        if not self._due(self.config.holdout_every):
            return {}
        values: list[dict[str, float]] = [{}]
        if self.holdout is not None:
            with self.averaged_weights():
                values = [self.holdout.measure(self.denoiser, self.step)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(values)
        return values[0]

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _rollout_file(self, folder: Path) -> Path:
        return folder / f"rollout-{self.accelerator.process_index}.safetensors"

    def _replayed(self) -> dict[str, Any]:
        """What must not change between the updates of one rollout."""
        settings = {name: getattr(self.config, name) for name in REPLAYED}
        return settings | {"number of processes": self.accelerator.num_processes}

    def _write_state(self, folder: Path) -> None:
        super()._write_state(folder)
        if self.step % self.config.updates_per_rollout and self.rollout is not None:
            self.rollout.save(self._rollout_file(folder), self._replayed())

    def load_checkpoint(self, folder: Path) -> None:
        super().load_checkpoint(folder)
        if not self.step % self.config.updates_per_rollout:
            return
        if not self._rollout_file(folder).is_file():
            raise CheckpointError(
                f"{folder} was written between two updates of one rollout, but holds no rollout of process "
                f"{self.accelerator.process_index}. Resume with the number of processes it was written by."
            )
        iteration = self.step // self.config.updates_per_rollout
        self.rollout = Rollout.load(
            self._rollout_file(folder),
            self._replayed(),
            self.sampling.plan(iteration),
            self._chunks(iteration),
            self.accelerator.device,
        )


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    return keyed_permutation(count, seed, epoch, "prompt order")


def _group(n: int, size: int) -> range:
    first = n // size * size
    return range(first, first + size)

"""The loop that every trainer shares: models, optimizer, logs, checkpoints, exports.

A trainer is a subclass with two things: an ``__init__`` that reads its data and then calls :meth:`start`, and
:meth:`optimizer_step`, which finds gradients and ends with :meth:`apply_gradients`.
"""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config_rules import check
from ..data.files import write_whole
from ..environment import code_commit
from ..errors import CheckpointError, ConfigError, DivergenceError
from ..pipelines import adapter_for, load_pipeline, save_lora, save_pipeline
from ..pipelines.hub import model_licence
from .checkpoints import find_checkpoint, load_trainable, save_trainable, write_checkpoint
from .config import TrainingConfig
from .health import HealthMonitor
from .metrics import MetricAccumulator
from .model_card import push_to_hub, write_model_card
from .optimizers import build_optimizer, build_schedule
from .policy import DTYPES, prepare_policy
from .reference import build_reference
from .trackers import Trackers
from .validation import Validation

log = logging.getLogger(__name__)
TIMING = "time/"  # metrics that depend on the clock; kept out of metrics.jsonl
HOLDOUT = "holdout/"  # metrics of the policy's pictures on prompts that it is not trained on
#: How long processes wait for the one that draws validation pictures or is kept waiting by a judge. NCCL's own ten
#: minutes would end a run on several GPUs that only takes its time.
LONGEST_WAIT = timedelta(hours=3)


class TrainingLoop(ABC):
    """Trains a diffusers pipeline's denoiser.

    Args:
        pipeline: a diffusers pipeline, a hub id, a folder, or ``shapes`` for the embedded default. Its denoiser is
            trained in place.
        config: settings of the method.
        train_dataset: what is learnt from, or what :meth:`load_dataset` accepts.
        accelerator: an existing one; None makes one.
        base_model: the pipeline's name in reports and on the model card; None takes it from the pipeline.

    Raises:
        ConfigError: settings that contradict each other or the pipeline.
        DataError: data that cannot be used.
        CheckpointError: ``output_dir`` holds another run and ``resume`` is ``none``.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[TrainingConfig]]

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        config: TrainingConfig,
        train_dataset: Any,
        accelerator: Accelerator | None = None,
        *,
        base_model: str | None = None,
    ) -> None:
        if not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(config).__name__}."
            )
        check(config)
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.checkpoint = find_checkpoint(self.output_dir, config.resume)
        self.dataset = self.load_dataset(train_dataset)
        self.accelerator = accelerator or Accelerator(
            mixed_precision=config.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        )
        self.pipeline = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
        self.base_model = base_model or (
            pipeline if isinstance(pipeline, str) else str(self.pipeline.name_or_path or "")
        )
        self.adapter = adapter_for(self.pipeline, vae_dtype=DTYPES[config.vae_dtype])
        self.adapter.configure(max_prompt_tokens=config.max_prompt_tokens, guidance_embedding=config.guidance_embedding)
        self.schedule = self.adapter.noise_schedule(zero_terminal_snr=config.zero_terminal_snr)
        self.global_batch = config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        self.step = 0
        self.seconds = 0.0  # spent on these steps, by all starts of the run
        self.latest: dict[str, float] = {}  # metrics of the last of them
        self.saved_step = 0  # of the checkpoint that was written or continued last
        self.report: dict[str, Any] = {}

    # --- what a trainer defines ----------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def load_dataset(source: Any, **options: Any) -> Any:
        """The data that ``source`` names; data that are already loaded come back as they are.

        Args:
            source: a path, a name, or loaded data.
            options: ``split``, ``revision``, ``score`` and ``bad_rows`` of a :class:`diffalign.config.Job`.
        """

    @abstractmethod
    def optimizer_step(self) -> dict[str, float]:
        """One update of the weights; returns its metrics, equal on all processes, ``loss`` among them."""

    @abstractmethod
    def data_report(self) -> dict[str, Any]:
        """What is trained on, for the report; ``examples`` is its number."""

    @property
    @abstractmethod
    def data_name(self) -> str:
        """The data's name on the model card."""

    @abstractmethod
    def validation_embeddings(self) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Encoded ``validation_prompts`` and the unconditional embeddings, without a batch dimension."""

    def state_dict(self) -> dict[str, Any]:
        """What a method must find again when it resumes; plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave.

        Raises:
            CheckpointError: there is a state, but this method keeps none.
        """
        if state:
            raise CheckpointError(f"the checkpoint holds {sorted(state)}, which this run does not use.")

    # --- preparation ---------------------------------------------------------------------------------------------

    def steps_of(self, examples: int) -> int:
        """Optimizer steps of the whole run, given the number of examples in an epoch."""
        return self.config.max_steps or math.ceil((self.config.max_epochs or 0) * examples / self.global_batch)

    def build_policy(self, *, temporary_reference: bool = False) -> None:
        """Make the denoiser trainable, and its reference where the method has one.

        Nothing is wrapped or sharded yet: the reference is an ordinary module on every process. A temporary one is
        used before the first step only, and copies nothing.
        """
        config = self.config
        self.parameters = prepare_policy(self.adapter, config, self.accelerator.device)
        self.denoiser: nn.Module = self.adapter.denoiser
        self.reference = None
        if config.has_reference:
            self.reference = build_reference(self.denoiser, config, temporary=temporary_reference)
        self.model = self.denoiser

    def start(self, total_steps: int) -> None:
        """Build optimizer, schedule and moving average, and hand everything to accelerate."""
        config, accelerator = self.config, self.accelerator
        self.total_steps = total_steps
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay is not None else None
        optimizer = build_optimizer(self.parameters, config)
        self.lr_schedule = build_schedule(optimizer, config, total_steps)
        self.model, self.optimizer = accelerator.prepare(self.denoiser, optimizer)
        # Not prepared: accelerate's wrapper would advance it once per process.
        accelerator.register_for_checkpointing(self.lr_schedule, *([self.ema] if self.ema else []))
        if accelerator.distributed_type in ("NO", "MULTI_GPU", "MULTI_CPU"):
            # Only what is trained, not a frozen base of gigabytes.
            accelerator.register_save_state_pre_hook(partial(save_trainable, self.denoiser, accelerator))
            accelerator.register_load_state_pre_hook(partial(load_trainable, self.denoiser))
        self.metrics = MetricAccumulator(num_timesteps=self.schedule.num_timesteps)
        self.health = HealthMonitor()
        self.recent: list[dict[str, float]] = []  # metrics of the steps since the last logged line

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Run to ``max_steps``, continuing from a checkpoint where there is one; save the final weights.

        Returns:
            A report: steps, the seconds they took over all starts, pair counts, last metrics, alarms; also written to
            ``training_report.json``.

        Raises:
            DivergenceError: a loss or gradient is not finite; a usable checkpoint of the step before is written.
        """
        if self.checkpoint is not None:
            self.load_checkpoint(self.checkpoint)
        trackers = Trackers(self.accelerator, self.config, self.output_dir, resumed_step=self.step)
        validation = self._prepare_validation()
        started = time.monotonic() - self.seconds
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=self.method,
            unit="step",
            disable=not (self.config.progress_bar and self.accelerator.is_main_process),
        )
        try:
            while self.step < self.total_steps:
                self.latest = self.optimizer_step()
                self._watch(self.latest, trackers, bar)
                if validation is not None and self._due(self.config.validate_every):
                    self._validate(validation, trackers)
                self.seconds = time.monotonic() - started
                if self._due(self.config.save_every) or self.step == self.total_steps:
                    self.save_checkpoint()
        finally:
            bar.close()
            trackers.close()
        self.report = {
            "method": self.method,
            "base_model": self.base_model,
            "commit": code_commit(),
            "steps": self.step,
            **self.data_report(),
            "global_batch": self.global_batch,
            "seconds": self.seconds,
            "seconds_per_step": self.seconds / max(1, self.step),
            "metrics": self.latest,
            "alarms": self.health.raised,
        }
        if self.accelerator.is_main_process:
            write_whole(self.output_dir / "training_report.json", json.dumps(self.report, indent=2))
        self.save_model()
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        return self.report

    def apply_gradients(self) -> dict[str, float]:
        """Clip, step the optimizer, its schedule and the moving average; count the step.

        Returns:
            ``grad_norm`` and ``learning_rate``.

        Raises:
            DivergenceError: the gradient is not finite; a usable checkpoint is written first.
        """
        config = self.config
        limit = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.parameters, limit)
        if norm is not None and config.mixed_precision != "fp16" and not torch.isfinite(norm):
            self.stop(f"the gradient's norm is {norm.item()} at step {self.step + 1} although every loss is finite")
        learning_rate = float(self.lr_schedule.get_last_lr()[0])
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.lr_schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"grad_norm": float(norm) if norm is not None else 0.0, "learning_rate": learning_rate}

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _watch(self, metrics: dict[str, float], trackers: Trackers, bar: tqdm) -> None:
        """Log the means since the last line, raise alarms, move the bar.

        Hold-out scores get a line at their own step, and the last step always has one.
        """
        self.recent.append(metrics)
        scored = any(name.startswith(HOLDOUT) for name in metrics)
        if trackers.due(self.step) or scored or self.step == self.total_steps:
            names = {name for line in self.recent for name in line}
            lines = {name: [line[name] for line in self.recent if name in line] for name in sorted(names)}
            means = {name: math.fsum(values) / len(values) for name, values in lines.items()}
            timing = {name: means.pop(name) for name in names if name.startswith(TIMING)}
            trackers.log(means, self.step, timing=timing)
            self.recent = []
        if self.config.alarms:
            for alarm in self.health.update(self.step, metrics):
                log.warning("step %d: %s", self.step, alarm.message)
        shown = {"loss": f"{metrics['loss']:.4f}"}
        if "rewards/accuracies" in metrics:
            shown["accuracy"] = f"{metrics['rewards/accuracies']:.2f}"
        bar.set_postfix(shown, refresh=False)
        bar.update()

    def _prepare_validation(self) -> Validation | None:
        """Draws the base's pictures once, before the first step; a resumed run reads them back."""
        if self.config.validate_every is None or not self.accelerator.is_main_process:
            return None
        validation = Validation.of_run(
            self.adapter,
            *self.validation_embeddings(),
            self.config,
            self.output_dir,
            autocast=self.accelerator.autocast,
        )
        validation.prepare(self.denoiser, resumed=self.step > 0)
        return validation

    def _validate(self, validation: Validation, trackers: Trackers) -> None:
        with self.averaged_weights():
            _, images = validation.run(self.step, self.denoiser)
        trackers.log_images({"validation": images}, self.step)

    def require_finite(self, losses: list[tuple[list[str], Tensor]]) -> None:
        bad = sum((~torch.isfinite(loss)).sum() for _, loss in losses)
        assert isinstance(bad, Tensor)
        if not self.accelerator.reduce(bad.float()).item():
            return
        rows = [row for ids, loss in losses for row, value in zip(ids, loss, strict=True) if not torch.isfinite(value)]
        rows = gather_object(rows) if self.accelerator.num_processes > 1 else rows
        listed = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        self.stop(f"the loss is not finite at step {self.step + 1} for row(s) {listed}")

    def stop(self, problem: str) -> None:
        """Save the weights, which the bad step has not touched, and refuse to go on."""
        self.optimizer.zero_grad(set_to_none=True)
        self.metrics.reduce(self.accelerator)  # forget what the bad step added
        path = self.save_checkpoint()
        raise DivergenceError(
            f"{problem}. {path} holds the weights before that step. Look at these rows with `diffalign data check`, "
            "lower learning_rate or beta, or use mixed_precision=bf16 in place of fp16."
        )

    # --- weights and checkpoints ---------------------------------------------------------------------------------

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The moving average in place of the trained weights, where one is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def save_model(self, folder: str | Path | None = None) -> Path:
        """Write the trained weights and a model card; the moving average where one is kept.

        Args:
            folder: target; None means ``output_dir/final``. An adapter is written in diffusers' and in the
                kohya/ComfyUI naming, full weights as a pipeline folder.
        """
        folder = Path(folder) if folder is not None else self.output_dir / "final"
        if self.accelerator.is_main_process:
            with self.averaged_weights():
                save = save_pipeline if self.config.adapter == "none" else save_lora
                save(self.adapter, folder)
            write_model_card(
                folder,
                config=self.config,
                base_model=self.base_model,
                base_model_license=model_licence(self.base_model, ask_hub=self.config.push_to_hub),
                pipeline_class=type(self.pipeline).__name__,
                dataset=self.data_name,
                examples=self.data_report()["examples"],
                steps=self.step,
                metrics=self.report.get("metrics"),
                alarms=self.health.fired,
                images=sorted((self.output_dir / "validation").glob("step-*.png"))[-1:],
            )
        self.accelerator.wait_for_everyone()
        return folder

    def push_to_hub(self) -> str:
        """Upload the final weights with their model card; returns the commit's address."""
        return push_to_hub(self.output_dir / "final", self.config)

    def save_checkpoint(self) -> Path:
        """Write everything needed to continue exactly; see :mod:`diffalign.trainers.checkpoints`."""
        path = write_checkpoint(
            self.output_dir,
            self.step,
            self._write_state,
            keep=self.config.keep_checkpoints,
            after=self.saved_step,
            is_main=self.accelerator.is_main_process,
            barrier=self.accelerator.wait_for_everyone,
        )
        self.saved_step = self.step
        return path

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder), safe_serialization=True)
        if self.accelerator.is_main_process:
            state = {"step": self.step, "identity": self._identity(), "recent": self.recent}
            state |= {"metrics": self.latest, "seconds": self.seconds}
            state |= {"health": self.health.state_dict(), "method": self.state_dict()}
            (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))
            (folder / "training_config.json").write_text(json.dumps(asdict(self.config), indent=1))

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            CheckpointError: it was made with another reference, data, method or batch, each named.
        """
        state = json.loads((folder / "trainer_state.json").read_text())
        theirs, mine = state["identity"], self._identity()
        if wrong := [name for name in theirs | mine if theirs.get(name) != mine.get(name)]:
            differences = "; ".join(f"its {n} is {theirs.get(n)!r}, this run's is {mine.get(n)!r}" for n in wrong)
            raise CheckpointError(
                f"{folder} belongs to another run: {differences}. Resume with the same {', '.join(wrong)}, or train "
                "into another output_dir."
            )
        self.accelerator.load_state(str(folder))
        self.step = self.saved_step = state["step"]
        self.latest, self.seconds = state["metrics"], state["seconds"]
        self.recent = state["recent"]
        self.health.load_state_dict(state["health"])
        self.load_state_dict(state["method"])
        log.info("continuing from %s", folder)

    def _identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation; a subclass adds its data."""
        known: dict[str, Any] = {"method": self.method, "seed": self.config.seed, "adapter": self.config.adapter}
        known["global_batch"] = self.global_batch
        return known | ({"reference": self.reference.identity} if self.reference is not None else {})

"""The training loop that every offline method shares.

A step reads: take the step's rows, noise each image, let reference and policy predict, hand the matrix of squared
errors to the method's objective, step the optimizer. A method is a subclass with one function, :meth:`compute`; the
other hooks (:meth:`select_examples`, :meth:`noised`, :meth:`after_step`, :meth:`state_dict`) have a default.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import check
from ..data import EncodedPreferences, Example, PreferenceDataset, curriculum, load_preferences, select_pairs
from ..errors import CheckpointError, ConfigError, DataError, DivergenceError
from ..objectives import LossOutput
from ..pipelines import adapter_for, load_pipeline, save_lora, save_pipeline
from ..randomness import keyed_seed
from .batches import Batch, Collator, RowStream, micro_batches
from .checkpoints import find_checkpoint, load_trainable, save_trainable, write_checkpoint
from .config import TrainingConfig
from .health import HealthMonitor
from .metrics import MetricAccumulator
from .model_card import push_to_hub, write_model_card
from .optimizers import build_optimizer, build_schedule
from .passes import Passes
from .policy import DTYPES, prepare_policy
from .precompute import ReferenceErrors
from .reference import build_reference
from .trackers import Trackers
from .validation import Validation

log = logging.getLogger(__name__)


class PreferenceTrainer(ABC):
    """Aligns a diffusers pipeline with a preference table.

    Args:
        pipeline: a diffusers pipeline, a hub id, a folder, or ``shapes`` for the embedded default. Its denoiser is
            trained in place.
        config: settings of the method.
        train_dataset: preferences, or what :func:`diffalign.load_preferences` accepts.
        accelerator: an existing one; None makes one.
        base_model: the pipeline's name in reports and on the model card; None takes it from the pipeline.

    Raises:
        ConfigError: settings that contradict each other or the pipeline.
        DataError: a table without a single usable pair.
        CheckpointError: ``output_dir`` holds another run and ``resume`` is ``none``.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[TrainingConfig]]

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        config: TrainingConfig,
        train_dataset: PreferenceDataset | Any,
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
        self.accelerator = accelerator or Accelerator(mixed_precision=config.mixed_precision)
        self.pipeline = load_pipeline(pipeline) if isinstance(pipeline, str) else pipeline
        self.base_model = base_model or (pipeline if isinstance(pipeline, str) else str(pipeline.name_or_path or ""))
        self.adapter = adapter_for(self.pipeline, vae_dtype=DTYPES[config.vae_dtype])
        self.adapter.configure(max_prompt_tokens=config.max_prompt_tokens, guidance_embedding=config.guidance_embedding)
        is_loaded = isinstance(train_dataset, PreferenceDataset)
        self.dataset = train_dataset if is_loaded else load_preferences(train_dataset)
        self.examples, self.pair_counts = self.select_examples()
        if not self.examples:
            raise DataError(f"no row of the table gives a pair to train on: {self.pair_counts}.")
        self.schedule = self.adapter.noise_schedule(zero_terminal_snr=config.zero_terminal_snr)
        self.global_batch = config.batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        self.total_steps = config.max_steps or math.ceil(
            (config.max_epochs or 0) * len(self.examples) / self.global_batch
        )
        self.step = 0
        self.report: dict[str, Any] = {}
        self._encode()
        self._build_models()

    # --- what a method defines -----------------------------------------------------------------------------------

    @abstractmethod
    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        """The objective: errors (B, k), best image first, to per-prompt losses (B,)."""

    def select_examples(self) -> tuple[list[Example], dict[str, int]]:
        """Which images of which rows are trained on together; pairs unless a method wants lists."""
        config = self.config
        return select_pairs(self.dataset, pairs=config.pairs, min_margin=config.min_margin, ties=config.ties)

    def noised(self, batch: Batch) -> Batch:
        """The batch with the noise that the method trains on; as drawn unless a method inverts its images."""
        return batch

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        """Called with the step's metrics, equal on all processes; returns more of them."""
        return {}

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

    def _encode(self) -> None:
        """Fill (or find) the cache, then move the VAE and the text encoders out of the device's memory."""
        config, accelerator = self.config, self.accelerator
        self.encoded = EncodedPreferences.build(
            self.dataset,
            self.adapter,
            config,
            folder=Path(config.cache_dir) if config.cache_dir else self.output_dir / "cache",
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            barrier=accelerator.wait_for_everyone,
            device=accelerator.device,
            extra_prompts=config.validation_prompts,
            examples=self.examples,
        )
        self.adapter.offload_encoders()
        self.buckets = [(*self.encoded.bucket(example.row), len(example.candidates)) for example in self.examples]
        stages = curriculum(self.examples, config.curriculum_stages) if config.curriculum_stages else ()
        self.stream = RowStream(
            self.buckets, self.global_batch, config.seed, stages=stages, total_steps=self.total_steps
        )
        self.passes = Passes(self.adapter, self.schedule, config, accelerator)
        self.collate = Collator(self.examples, self.encoded, self.adapter, self.schedule, config, accelerator.device)

    def _build_models(self) -> None:
        config, accelerator = self.config, self.accelerator
        self.parameters = prepare_policy(self.adapter, config, accelerator.device)
        self.denoiser: nn.Module = self.adapter.denoiser
        self.reference = build_reference(self.denoiser, config) if config.has_reference else None
        self.model = self.denoiser
        self.precomputed: ReferenceErrors | None = None
        if self.reference is not None and config.precompute_reference is not None:
            # Before weights are wrapped or sharded: the reference is then an ordinary module on every process.
            self.precomputed = ReferenceErrors.build(self, config.precompute_reference)
            self.reference.release()
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.ema_decay is not None else None
        optimizer = build_optimizer(self.parameters, config)
        self.lr_schedule = build_schedule(optimizer, config, self.total_steps)
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
            A report: steps, seconds, pair counts, last metrics, alarms; also written to ``training_report.json``.

        Raises:
            DivergenceError: a loss or gradient is not finite; a usable checkpoint of the step before is written.
        """
        if self.checkpoint is not None:
            self.load_checkpoint(self.checkpoint)
        trackers = Trackers(self.accelerator, self.config, self.output_dir, resumed_step=self.step)
        validation = self._prepare_validation()
        started, first = time.monotonic(), self.step
        bar = tqdm(
            total=self.total_steps,
            initial=self.step,
            desc=self.method,
            unit="step",
            disable=not (self.config.progress_bar and self.accelerator.is_main_process),
        )
        latest: dict[str, float] = {}
        try:
            while self.step < self.total_steps:
                latest = self._optimizer_step()
                self._watch(latest, trackers, bar)
                if validation is not None and self._due(self.config.validate_every):
                    self._validate(validation, trackers)
                if self._due(self.config.save_every) or self.step == self.total_steps:
                    self.save_checkpoint()
        finally:
            bar.close()
            trackers.close()
        seconds = time.monotonic() - started
        self.report = {
            "method": self.method,
            "base_model": self.base_model,
            "steps": self.step,
            "examples": len(self.examples),
            "pair_counts": self.pair_counts,
            "global_batch": self.global_batch,
            "seconds": seconds,
            "seconds_per_step": seconds / max(1, self.step - first),
            "metrics": latest,
            "alarms": self.health.raised,
        }
        if self.accelerator.is_main_process:
            (self.output_dir / "training_report.json").write_text(json.dumps(self.report, indent=2))
        self.save_model()
        if self.config.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        return self.report

    def _optimizer_step(self) -> dict[str, float]:
        """One update from the global batch of ``self.step``; returns the step's metrics over all processes."""
        accelerator, config = self.accelerator, self.config
        share = self.global_batch // accelerator.num_processes
        first = accelerator.process_index * share
        draws = self.stream.step(self.step)[first : first + share]
        parts = list(micro_batches(draws, self.buckets, config.batch_size))
        torch.manual_seed(keyed_seed(config.seed, self.step, accelerator.process_index, "dropout"))
        losses: list[tuple[list[str], Tensor]] = []
        for part in parts:
            batch = self.noised(self.collate(part))
            out = self._forward_backward(batch, sync=part is parts[-1])
            losses.append((batch.row_ids, out.loss.detach()))
            self.metrics.add({"loss": out.loss.detach(), **out.stats}, batch.timesteps)
        self._require_finite(losses)
        norm = accelerator.clip_grad_norm_(
            self.parameters, math.inf if config.max_grad_norm is None else config.max_grad_norm
        )
        if norm is not None and config.mixed_precision != "fp16" and not torch.isfinite(norm):
            self._stop(f"the gradient's norm is {norm.item()} at step {self.step + 1} although every loss is finite")
        learning_rate = float(self.lr_schedule.get_last_lr()[0])
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.lr_schedule.step()
            if self.ema is not None:
                self.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        metrics = self.metrics.reduce(accelerator)
        metrics |= {"grad_norm": float(norm) if norm is not None else 0.0, "learning_rate": learning_rate}
        return metrics | self.after_step(metrics)

    def _forward_backward(self, batch: Batch, *, sync: bool) -> LossOutput:
        """Objective and gradients of a micro-batch; ``sync`` says whether processes exchange gradients after it."""
        reference_error = self.reference_error(batch)
        out, policy_error = self.passes.backward(
            self.model,
            batch,
            lambda error: self.compute(error, reference_error, batch),
            # The gradient is the mean over the global batch: DDP averages over processes, so undo that part.
            scale=self.accelerator.num_processes / self.global_batch,
            sync=sync,
        )
        level = {"error/winner": policy_error[:, 0], "error/loser": policy_error[:, -1]}
        return LossOutput(out.loss, level | out.stats)

    @torch.no_grad()
    def reference_error(self, batch: Batch) -> Tensor | None:
        """The reference's errors (B, k), run or looked up; None for a method without a reference."""
        if self.precomputed is not None:
            return self.precomputed.lookup(batch.draws).to(batch.latents.device)
        if self.reference is None:
            return None
        with self.reference.use(self.model) as module:
            return self.passes.errors(module, batch.images()).view(batch.shape)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _watch(self, metrics: dict[str, float], trackers: Trackers, bar: tqdm) -> None:
        """Log the means since the last line, raise alarms, move the bar."""
        self.recent.append(metrics)
        if trackers.due(self.step):
            names = {name for line in self.recent for name in line}
            lines = {name: [line[name] for line in self.recent if name in line] for name in sorted(names)}
            trackers.log({name: math.fsum(values) / len(values) for name, values in lines.items()}, self.step)
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
            self.adapter, self.encoded, self.config, self.output_dir, autocast=self.accelerator.autocast
        )
        validation.prepare(self.denoiser, resumed=self.step > 0)
        return validation

    def _validate(self, validation: Validation, trackers: Trackers) -> None:
        with self.averaged_weights():
            _, images = validation.run(self.step, self.denoiser)
        trackers.log_images({"validation": images}, self.step)

    def _require_finite(self, losses: list[tuple[list[str], Tensor]]) -> None:
        bad = sum((~torch.isfinite(loss)).sum() for _, loss in losses)
        assert isinstance(bad, Tensor)
        if not self.accelerator.reduce(bad.float()).item():
            return
        rows = [row for ids, loss in losses for row, value in zip(ids, loss, strict=True) if not torch.isfinite(value)]
        rows = gather_object(rows) if self.accelerator.num_processes > 1 else rows
        listed = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        self._stop(f"the loss is not finite at step {self.step + 1} for row(s) {listed}")

    def _stop(self, problem: str) -> None:
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
                pipeline_class=type(self.pipeline).__name__,
                dataset=self.dataset.name,
                examples=len(self.examples),
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
        return write_checkpoint(
            self.output_dir,
            self.step,
            self._write_state,
            keep=self.config.keep_checkpoints,
            is_main=self.accelerator.is_main_process,
            barrier=self.accelerator.wait_for_everyone,
        )

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder), safe_serialization=True)
        if self.accelerator.is_main_process:
            state = {"step": self.step, "identity": self._identity(), "recent": self.recent}
            state |= {"health": self.health.state_dict(), "method": self.state_dict()}
            (folder / "trainer_state.json").write_text(json.dumps(state, indent=1))
            (folder / "training_config.json").write_text(json.dumps(asdict(self.config), indent=1))

    def load_checkpoint(self, folder: Path) -> None:
        """Continue from a checkpoint of the same run.

        Raises:
            CheckpointError: it was made with another reference, data, method or batch, each named.
        """
        state = json.loads((folder / "trainer_state.json").read_text())
        for name, value in self._identity().items():
            if state["identity"].get(name) != value:
                raise CheckpointError(
                    f"{folder} belongs to another run: its {name} is {state['identity'].get(name)!r}, this run's is "
                    f"{value!r}. Resume with the same {name}, or train into another output_dir."
                )
        self.accelerator.load_state(str(folder))
        self.step = state["step"]
        self.recent = state["recent"]
        self.health.load_state_dict(state["health"])
        self.load_state_dict(state["method"])
        log.info("continuing from %s", folder)

    def _identity(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its continuation."""
        config = self.config
        rows = hashlib.blake2b("".join(self.collate.row_ids).encode(), digest_size=8).hexdigest()
        base = {"method": self.method, "seed": config.seed, "global_batch": self.global_batch, "data": rows}
        base |= {"adapter": config.adapter, "examples": len(self.examples)}
        if config.curriculum_stages:  # the stages divide the length of the run
            base |= {"curriculum": [config.curriculum_stages, self.total_steps]}
        return base | {"reference": self.reference.identity} if self.reference is not None else base

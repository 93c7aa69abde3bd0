"""Offline preference training: a table of ranked images, and an objective on their denoising errors.

A step reads: take the step's rows, noise each image, let reference and policy predict, hand the matrix of squared
errors to the method's objective, step the optimizer. A method is a subclass with one function, :meth:`compute`; the
other hooks (:meth:`select_examples`, :meth:`noised`, :meth:`after_step`, :meth:`state_dict`) have a default.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..data import EncodedPreferences, Example, PreferenceDataset, curriculum, load_preferences, select_pairs
from ..errors import ConfigError, DataError
from ..objectives import LossOutput
from ..randomness import keyed_seed
from .batches import Batch, Collator, RowStream, micro_batches
from .config import PreferenceConfig
from .loop import TrainingLoop
from .noise_levels import TimestepSampler
from .passes import Passes
from .precompute import ReferenceErrors


class PreferenceTrainer(TrainingLoop):
    """Aligns a diffusers pipeline with a preference table.

    Args:
        pipeline, config, accelerator, base_model: see :class:`TrainingLoop`.
        train_dataset: preferences, or what :func:`diffalign.load_preferences` accepts.

    Raises:
        ConfigError: settings that contradict each other or the pipeline.
        DataError: a table without a single usable pair.
        CheckpointError: ``output_dir`` holds another run and ``resume`` is ``none``.
    """

    config_class: ClassVar[type[PreferenceConfig]]
    config: PreferenceConfig
    dataset: PreferenceDataset

    def __init__(
        self,
        pipeline: DiffusionPipeline | str,
        config: PreferenceConfig,
        train_dataset: PreferenceDataset | Any,
        accelerator: Accelerator | None = None,
        *,
        base_model: str | None = None,
    ) -> None:
        super().__init__(pipeline, config, train_dataset, accelerator, base_model=base_model)
        self.examples, self.pair_counts = self.select_examples()
        if config.negative:
            self.examples = [example.reversed() for example in self.examples]
        if not self.examples:
            raise DataError(f"no row of the table gives a pair to train on: {self.pair_counts}.")
        total_steps = self.steps_of(len(self.examples))
        self._encode(total_steps)
        self.build_policy(temporary_reference=config.precompute_reference is not None)
        if config.images_per_pass is not None and any(
            isinstance(module, nn.Dropout) and module.p > 0 for module in self.denoiser.modules()
        ):
            raise ConfigError(
                f"images_per_pass={config.images_per_pass} runs each image twice, and the dropout of this network "
                "would differ between the two: set it to 0 in the network's configuration, or leave images_per_pass "
                "out."
            )
        self.precomputed: ReferenceErrors | None = None
        if self.reference is not None and config.precompute_reference is not None:
            self.precomputed = ReferenceErrors.build(self, config.precompute_reference)
            self.reference.release()
        self.start(total_steps)

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

    # --- data ----------------------------------------------------------------------------------------------------

    @staticmethod
    def load_dataset(source: Any, **options: Any) -> PreferenceDataset:
        return source if isinstance(source, PreferenceDataset) else load_preferences(source, **options)

    def _encode(self, total_steps: int) -> None:
        """Fill (or find) the cache, then move the VAE and the text encoders out of the device's memory."""
        config, accelerator = self.config, self.accelerator
        timesteps = TimestepSampler(self.schedule, config)
        timesteps.draw(torch.Generator(), shift=1.0)  # what cannot be is refused now, not after all is encoded
        stages = curriculum(self.examples, config.curriculum_stages) if config.curriculum_stages else ()
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
        self.stream = RowStream(self.buckets, self.global_batch, config.seed, stages=stages, total_steps=total_steps)
        self.passes = Passes(self.adapter, self.schedule, config, accelerator)
        self.collate = Collator(self.examples, self.encoded, self.adapter, timesteps, config, accelerator.device)

    def data_report(self) -> dict[str, Any]:
        return {"examples": len(self.examples), "pair_counts": self.pair_counts}

    @property
    def data_name(self) -> str:
        return self.dataset.name

    def validation_embeddings(self) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        prompts = [self.encoded.prompt(prompt) for prompt in self.config.validation_prompts]
        return prompts, self.encoded.unconditional()

    @cached_property
    def _data_identity(self) -> str:
        """Hash of what is compared and how it was judged, in the order of the examples."""
        digest = hashlib.blake2b(digest_size=8)
        for example in self.examples:
            judged = [example.candidates, example.probability, example.preference]
            digest.update(json.dumps([self.encoded.row_ids[example.row], *judged]).encode())
        return digest.hexdigest()

    def _identity(self) -> dict[str, Any]:
        data: dict[str, Any] = {"data": self._data_identity, "examples": len(self.examples)}
        if self.config.negative:
            data["negative"] = True
        if self.config.curriculum_stages:  # the stages divide the length of the run
            data["curriculum"] = [self.config.curriculum_stages, self.total_steps]
        return super()._identity() | data

    # --- a step --------------------------------------------------------------------------------------------------

    def optimizer_step(self) -> dict[str, float]:
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
        self.require_finite(losses)
        applied = self.apply_gradients()
        metrics = self.metrics.reduce(accelerator) | applied
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

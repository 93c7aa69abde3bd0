"""The reference's errors, found once for every keyed draw of a row, so that the reference can leave memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Example
from ..data.files import atomic_file
from .batches import Collator, Draw, micro_batches

if TYPE_CHECKING:
    from .base import PreferenceTrainer

log = logging.getLogger(__name__)

FILE = "reference-errors.safetensors"
# Settings that change no error; all others make the file another one.
WITHOUT_EFFECT = frozenset(
    ("output_dir", "resume", "max_steps", "max_epochs", "batch_size", "gradient_accumulation_steps")
    + ("optimizer", "learning_rate", "lr_schedule", "warmup_steps", "adam_beta1", "adam_beta2", "adam_epsilon")
    + ("weight_decay", "max_grad_norm", "ema_decay", "gradient_checkpointing", "cache_dir", "encode_batch_size")
    + ("save_every", "keep_checkpoints", "log_every", "trackers", "project_name", "progress_bar", "validate_every")
    + ("validation_prompts", "validation_steps", "validation_guidance", "alarms", "push_to_hub", "hub_model_id")
    + ("hub_private", "beta", "images_per_pass", "channels_last")
)


class ReferenceErrors:
    """Errors of the reference by row, candidate and visit.

    Args:
        examples: the run's pairs or lists.
        place: index of each (row, candidate).
        errors: (m, images) fp32.
    """

    def __init__(self, examples: Sequence[Example], place: dict[tuple[int, int], int], errors: Tensor) -> None:
        self.examples, self.place, self.errors = examples, place, errors

    def lookup(self, draws: Sequence[Draw]) -> Tensor:
        """Errors (B, k) of a batch made from these draws."""
        visits = self.errors.shape[0]
        rows = []
        for draw in draws:
            example = self.examples[draw.example]
            columns = [self.place[example.row, candidate] for candidate in example.candidates]
            rows.append(self.errors[draw.epoch % visits, columns])
        return torch.stack(rows)

    @classmethod
    def build(cls, trainer: PreferenceTrainer, draws_per_row: int) -> ReferenceErrors:
        """Find the file of an earlier start of this run, or compute the errors and write it.

        Each image that some pair compares is run ``draws_per_row`` times, whatever the number of its pairs. The work is
        divided over the processes.

        Args:
            trainer: gives rows, draws, noise and the reference.
            draws_per_row: m.
        """
        rows: dict[int, set[int]] = defaultdict(set)
        for example in trainer.examples:
            rows[example.row].update(example.candidates)
        lists = [Example(row, tuple(sorted(used)), 1.0, (0.0,) * len(used)) for row, used in rows.items()]
        place = {key: i for i, key in enumerate((item.row, c) for item in lists for c in item.candidates)}
        path = Path(trainer.output_dir) / FILE
        identity = _identity(trainer, place)
        errors = _read(path, identity)
        if errors is None:
            errors = _compute(trainer, lists, place, draws_per_row)
            if trainer.accelerator.is_main_process:
                with atomic_file(path) as file:
                    file.write(save({"errors": errors}, metadata={"identity": identity}))
        return cls(trainer.examples, place, errors)


def _compute(
    trainer: PreferenceTrainer, lists: list[Example], place: dict[tuple[int, int], int], draws_per_row: int
) -> Tensor:
    accelerator, config = trainer.accelerator, trainer.config
    collate = Collator(lists, trainer.encoded, trainer.adapter, trainer.collate.timesteps, config, accelerator.device)
    shapes = [(*trainer.encoded.bucket(item.row), len(item.candidates)) for item in lists]
    own = range(accelerator.process_index, len(lists), accelerator.num_processes)
    draws = [Draw(i, visit) for visit in range(draws_per_row) for i in own]
    errors = torch.zeros(draws_per_row, len(place))
    batches = list(micro_batches(draws, shapes, config.batch_size))
    shown = config.progress_bar and accelerator.is_main_process
    for part in tqdm(batches, desc="reference errors", unit="batch", disable=not shown):
        batch = trainer.noised(collate(part))
        found = trainer.reference_error(batch)
        assert found is not None
        for draw, values in zip(part, found.cpu(), strict=True):
            item = lists[draw.example]
            errors[draw.epoch, [place[item.row, candidate] for candidate in item.candidates]] = values
    if accelerator.num_processes == 1:
        return errors
    # Each process has zeros where the others have errors.
    return accelerator.reduce(errors.to(accelerator.device), reduction="sum").cpu()


def _identity(trainer: PreferenceTrainer, place: dict[tuple[int, int], int]) -> str:
    """Hash of all that the errors depend on."""
    assert trainer.reference is not None
    settings = {name: value for name, value in asdict(trainer.config).items() if name not in WITHOUT_EFFECT}
    known = [trainer.reference.identity, trainer.adapter.encoder_identity(), settings, trainer.encoded.row_ids]
    known += [trainer.method, [list(key) for key in place]]
    # of the scheduler: what noise a timestep means, and by its shift which timesteps are drawn
    sizes = sorted({bucket[:2] for bucket in trainer.buckets})
    known += [trainer.schedule.identity, [(size, trainer.adapter.time_shift(size)) for size in sizes]]
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).hexdigest()


def _read(path: Path, identity: str) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if file.metadata().get("identity") == identity:
                return file.get_tensor("errors").clone()
        log.warning("%s belongs to other settings or data; the reference's errors are computed again", path)
    except (SafetensorError, OSError) as error:
        log.warning("%s is damaged (%s); the reference's errors are computed again", path, error)
    return None

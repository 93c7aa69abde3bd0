"""A training run as a program, for tests that kill it or start it in several processes.

    python -m tests.trainers.program OUTPUT_DIR KILL_AT [key=value ...]

KILL_AT is `never`, `step:N` (SIGKILL once N steps are done, before anything is saved) or `save:N` (SIGKILL in the
middle of writing the checkpoint of step N). Several of both, with commas, are started one after another, each in a
process of its own but with the imports of the first; the exit status of all but the last is printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from diffalign.trainers import DPOConfig, DPOTrainer, SmPOConfig, SmPOTrainer
from tests.tiny import tiny_sdxl
from tests.trainers.conftest import preference_rows

METHODS = {"dpo": (DPOTrainer, DPOConfig), "smpo": (SmPOTrainer, SmPOConfig)}


class Mortal:
    """A trainer with this before it dies where it is told to."""

    kill_at = ("never", 0)

    def optimizer_step(self) -> dict[str, float]:
        metrics = super().optimizer_step()
        if self.kill_at == ("step", self.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return metrics

    def _write_state(self, folder: Path) -> None:
        super()._write_state(folder)
        if self.kill_at == ("save", self.step):
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    folders, kills, *settings = sys.argv[1:]
    *before, last = zip(folders.split(","), kills.split(","), strict=True)
    for first in before:
        if os.fork() == 0:
            return start(*first, settings)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.wait()[1])}\n")
    start(*last, settings)


def start(output_dir: str, kill_at: str, settings: list[str]) -> None:
    kind, _, step = kill_at.partition(":")
    Mortal.kill_at = (kind, int(step or 0))
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in settings)}
    defaults = {"max_steps": 6, "batch_size": 2, "learning_rate": 1e-2, "ema_decay": 0.9, "warmup_steps": 3}
    defaults |= {"save_every": 2, "log_every": 2, "caption_dropout": 0.3, "lora_dropout": 0.1, "resume": "latest"}
    trainer, config = METHODS[options.pop("method", "dpo")]
    settings_of = config(output_dir=output_dir, progress_bar=False, **(defaults | options))
    type("MortalTrainer", (Mortal, trainer), {})(tiny_sdxl(), settings_of, train_dataset=preference_rows()).train()


if __name__ == "__main__":
    main()

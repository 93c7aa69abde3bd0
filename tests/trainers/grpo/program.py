"""A Pref-GRPO run as a program, to start it in several processes: OUTPUT_DIR [key=value ...]."""

from __future__ import annotations

import json
import sys

import torch

from diffalign.trainers import PrefGRPOConfig, PrefGRPOTrainer
from reward_models import FunctionRewardModel
from tests.tiny import tiny_sdxl
from tests.trainers.grpo.conftest import PROMPTS, brightness


class Recorded(PrefGRPOTrainer):
    """Writes who drew what and what it was worth."""

    def roll_out(self, iteration):
        rollout = super().roll_out(iteration)
        drawn = [[s.prompt, s.group, s.member] for chunk in rollout.chunks for s in chunk.samples]
        told = {"pictures": drawn, "advantages": rollout.advantages.tolist()}
        name = f"iteration-{iteration}-{self.accelerator.process_index}.json"
        (self.output_dir / name).write_text(json.dumps(told))
        return rollout


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    output_dir, *settings = sys.argv[1:]
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in settings)}
    # Adam divides by the gradient's size, which turns rounding noise into full steps: epsilon damps that.
    defaults = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3, "adam_epsilon": 0.1, "log_every": 1}
    defaults |= {"group_size": 4, "prompts_per_rollout": 3, "sampling_steps": 4, "guidance_scale": 2.0}
    config = PrefGRPOConfig(output_dir=output_dir, progress_bar=False, resolution=32, **(defaults | options))
    Recorded(tiny_sdxl(), config, PROMPTS, reward_models=[FunctionRewardModel(brightness)]).train()


if __name__ == "__main__":
    main()

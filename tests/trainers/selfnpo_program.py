"""A Self-NPO run as a program, to start it in several processes: OUTPUT_DIR [key=value ...]."""

from __future__ import annotations

import json
import sys

import torch

from diffalign.trainers import SelfNPOConfig, SelfNPOTrainer
from tests.tiny import tiny_sdxl

PROMPTS = ["a red circle", "two blue stars", "a green square", "a star", "a ring", "two red rings"]


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    output_dir, *settings = sys.argv[1:]
    options = {key: json.loads(value) for key, value in (item.split("=", 1) for item in settings)}
    # Adam divides by the gradient's size, which turns rounding noise into full steps: epsilon damps that.
    defaults = {"max_steps": 3, "learning_rate": 1e-3, "adam_epsilon": 0.1, "log_every": 1, "teacher_guidance": -1.0}
    config = SelfNPOConfig(output_dir=output_dir, progress_bar=False, resolution=32, **(defaults | options))
    SelfNPOTrainer(tiny_sdxl(), config, PROMPTS).train()


if __name__ == "__main__":
    main()

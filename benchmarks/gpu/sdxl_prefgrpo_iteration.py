"""Seconds and peak memory of a Pref-GRPO iteration on SDXL at its true size, through the real trainer.

    python benchmarks/gpu/sdxl_prefgrpo_iteration.py                    # a CUDA device: a group of 8 at 1024 px
    python benchmarks/gpu/sdxl_prefgrpo_iteration.py --cases matching --batch-size 8
    python benchmarks/gpu/sdxl_prefgrpo_iteration.py --tiny             # anywhere: the same code on a toy model

An iteration draws a group, has it judged and makes one update. Weights are random, and the judge compares brightness,
so that its time is next to nothing: add that of a real one. ``log_ratio`` must be 0: on this device, in this precision,
the update then sees exactly what was drawn. Results go to ``benchmarks/results/`` as JSON, those of a failed case too.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import GIB, measure_cases, options, sdxl_pipeline
from PIL import Image

from diffalign.errors import DiffalignError
from diffalign.pipelines import estimate_memory
from diffalign.trainers import PrefGRPOConfig, PrefGRPOTrainer
from reward_models import FunctionRewardModel
from tests.tiny import tiny_sdxl

CASES: dict[str, dict[str, Any]] = {
    "sampling": {"noise_level": 1.0, "timestep_fraction": 0.6, "ratio_norm": True},  # as recipe sdxl-prefgrpo-lora
    "matching": {"objective": "matching", "matching_draws": 4},
}
PARTS = ("sampling", "waiting_for_rewards", "training", "step")


class Watched(PrefGRPOTrainer):
    """Tells the memory that drawing takes from that of the update."""

    drawing_peak = 0

    def roll_out(self, iteration: int) -> Any:
        reset_peak(self.accelerator.device)
        rollout = super().roll_out(iteration)
        self.drawing_peak = max(self.drawing_peak, peak(self.accelerator.device))
        reset_peak(self.accelerator.device)
        return rollout


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes: of the device since the last reset, of the process since it began where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(np.asarray(image).mean()) for image in images]


def settings_of(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Settings of a case: those of the SDXL recipe, at this size."""
    return {
        **{"prompts_per_rollout": args.groups, "group_size": args.group_size, "batch_size": args.batch_size},
        **{"sampling_steps": args.sampling_steps, "guidance_scale": 5.0, "clip_range": 1e-4},
        **{"adapter": "lora", "lora_rank": 32, "learning_rate": 1e-5, "mixed_precision": args.mixed_precision},
        **{"gradient_checkpointing": args.gradient_checkpointing, "attention": args.attention},
        **{"resolution": 32 if args.tiny else args.resolution},
        **CASES[case],
    }


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its record."""
    device = torch.device("cpu" if args.tiny else "cuda")
    torch.manual_seed(0)
    with device:
        pipeline = tiny_sdxl() if args.tiny else sdxl_pipeline()
    settings = settings_of(case, args)
    record: dict[str, Any] = {"case": case, "settings": settings}
    rounds = args.warmup + args.iterations
    with tempfile.TemporaryDirectory() as folder:
        config = PrefGRPOConfig(
            output_dir=folder, max_steps=rounds, progress_bar=False, encode_batch_size=2, **settings
        )
        prompts = [f"picture {number}" for number in range(rounds * args.groups)]
        trainer = Watched(pipeline, config, prompts, reward_models=[FunctionRewardModel(brightness)])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        rows, update_peak = [], 0
        try:
            for _ in range(rounds):
                rows.append(trainer.optimizer_step())  # one step of train(), without logs and checkpoints
                update_peak = max(update_peak, peak(device))
        except (DiffalignError, torch.OutOfMemoryError) as error:
            return record | {"error": str(error).splitlines()[0]}
    timed = rows[args.warmup :]
    estimate = estimate_memory(
        pipeline.unet.config, adapter=config.adapter, lora_rank=config.lora_rank,
        mixed_precision=config.mixed_precision, optimizer=config.optimizer, resolution=config.resolution,
        images=args.batch_size * (1 if case == "matching" else 2),  # with guidance both branches in one call
        gradient_checkpointing=config.gradient_checkpointing, reference_dtype=config.reference_dtype,
        vae_scale_factor=pipeline.vae_scale_factor,
    )  # fmt: skip
    record |= {
        "seconds": {name: statistics.median(row[f"time/{name}"] for row in timed) for name in PARTS},
        "seconds_each_iteration": [round(row["time/step"], 4) for row in timed],
        "first_iteration_seconds": rows[0]["time/step"],
        "log_ratio": max((row["log_ratio"] for row in rows), key=abs),
        "grad_norm": rows[-1]["grad_norm"],
        "estimated_memory_gib": round(estimate.total / GIB, 2),
    }
    return record | {
        "peak_memory_gib": {
            "drawing": round(trainer.drawing_peak / GIB, 2),
            "update": round(update_peak / GIB, 2),
        }
    }


def main(argv: list[str] | None = None) -> Path:
    parser = options(__doc__, CASES)
    parser.add_argument("--groups", type=int, default=1, help="prompts in an iteration")
    parser.add_argument("--group-size", type=int, default=8, help="pictures of each")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures drawn, and trained on, at once")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=2, help="timed iterations")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before the clock counts")
    return measure_cases("sdxl-prefgrpo-iteration", parser, argv, measure)


if __name__ == "__main__":
    main()

"""Seconds per pair and peak memory of Diffusion-DPO steps on SDXL at its true size, through the real trainer.

    python benchmarks/gpu/sdxl_dpo_step.py                      # a CUDA device; LoRA and full fine-tuning at 1024 px
    python benchmarks/gpu/sdxl_dpo_step.py --cases lora --batch-size 4 --no-gradient-checkpointing
    python benchmarks/gpu/sdxl_dpo_step.py --tiny               # anywhere: the same code on a toy model

Weights are random: speed and memory do not depend on their values. The VAE and the text encoders have their true
shapes too, and are used once to fill the cache, as in a real run. Results go to ``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import argparse
import gc
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import GIB, measure_cases, options, sdxl_pipeline
from PIL import Image

from diffalign.data import load_preferences
from diffalign.pipelines import estimate_memory
from diffalign.trainers import DPOConfig, DPOTrainer
from tests.tiny import tiny_sdxl

CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "lora_rank": 64, "optimizer": "adamw", "learning_rate": 1e-5},
    "full": {"adapter": "none", "optimizer": "adafactor", "learning_rate": 1e-8, "reference_dtype": "bf16"},
}


def rows(count: int, size: int) -> list[dict[str, Any]]:
    """Pairs of noise pictures: what they show does not change the time."""
    rng = np.random.default_rng(0)

    def picture() -> Image.Image:
        small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST)

    return [
        {"prompt": f"picture {i}", "images": [picture(), picture()], "preference": [1.0, 0.0]} for i in range(count)
    ]


def measure(case: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one case; returns its record."""
    device = torch.device("cpu" if args.tiny else "cuda")
    torch.manual_seed(0)
    with device:
        pipeline = tiny_sdxl() if args.tiny else sdxl_pipeline()
    resolution = 32 if args.tiny else args.resolution
    case_settings = dict(CASES[case])
    if args.mixed_precision == "no":  # without autocast the reference must have the policy's precision
        case_settings.pop("reference_dtype", None)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            max_steps=args.warmup + args.steps,
            batch_size=args.batch_size,
            mixed_precision=args.mixed_precision,
            gradient_checkpointing=args.gradient_checkpointing,
            attention=args.attention,
            resolution=resolution,
            progress_bar=False,
            encode_batch_size=2,
            **case_settings,
        )
        dataset = load_preferences(rows(2 * args.batch_size, resolution))
        trainer = DPOTrainer(pipeline, config, train_dataset=dataset)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds, metrics = [], {}
        for _ in range(args.warmup + args.steps):
            started = time.perf_counter()
            metrics = trainer.optimizer_step()  # one step of train(), without logs and checkpoints
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    timed = [s / args.batch_size for s in seconds[args.warmup :]]
    estimate = estimate_memory(
        pipeline.unet.config, adapter=config.adapter, lora_rank=config.lora_rank,
        mixed_precision=config.mixed_precision, optimizer=config.optimizer, resolution=resolution,
        images=2 * args.batch_size,
        gradient_checkpointing=config.gradient_checkpointing, reference_dtype=config.reference_dtype,
        vae_scale_factor=pipeline.vae_scale_factor,
    )  # fmt: skip
    record = {
        "case": case,
        "settings": {**case_settings, "batch_size": args.batch_size, "mixed_precision": args.mixed_precision,
                     "gradient_checkpointing": args.gradient_checkpointing, "attention": args.attention,
                     "resolution": resolution},
        "seconds_per_pair": statistics.median(timed),
        "seconds_per_pair_each_step": [round(s, 5) for s in timed],
        "first_step_seconds": seconds[0],
        "estimated_memory_gib": round(estimate.total / GIB, 2),
        "loss": metrics["loss"],
    }  # fmt: skip
    if device.type == "cuda":
        record["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        record["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
    else:
        record["peak_process_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)
    return record


def main(argv: list[str] | None = None) -> Path:
    parser = options(__doc__, CASES)
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per forward pass")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock counts")
    return measure_cases("sdxl-dpo-step", parser, argv, measure)


if __name__ == "__main__":
    main()

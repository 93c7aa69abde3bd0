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
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests.tiny and the published configurations

from diffalign.data import load_preferences  # noqa: E402
from diffalign.pipelines import estimate_memory  # noqa: E402
from diffalign.trainers import DPOConfig, DPOTrainer  # noqa: E402
from tests.pipelines.full_size import SDXL_UNET  # noqa: E402
from tests.tiny import NOISE, tiny_sdxl, tiny_tokenizer  # noqa: E402

log = logging.getLogger("sdxl_dpo_step")
GIB = 2**30
CASES: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "lora_rank": 64, "optimizer": "adamw", "learning_rate": 1e-5},
    "full": {"adapter": "none", "optimizer": "adafactor", "learning_rate": 1e-8, "reference_dtype": "bf16"},
}


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """SDXL base as published, with random weights, built on the default device."""
    tokenizer = tiny_tokenizer()
    shared = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": len(tokenizer) - 1}
    clip_l = CLIPTextConfig(
        **shared, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    clip_g = CLIPTextConfig(
        **shared, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu", pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )
    return StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(clip_l).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_g).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel.from_config(SDXL_UNET),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


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


def environment(tiny: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or None,
        "device": "cpu" if tiny else torch.cuda.get_device_name(),
        "cuda": None if tiny else torch.version.cuda,
        "model": "toy SDXL" if tiny else "SDXL base, random weights",
        "python": sys.version.split()[0],
        "packages": packages,
    }


def main(argv: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per forward pass")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock counts")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), default=None, help="bf16; fp32 with --tiny"
    )
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--attention", choices=("sdpa", "xformers", "eager"), default="sdpa")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU, to exercise this script")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this on a GPU, or with --tiny to try the script.")
    if args.mixed_precision is None:
        args.mixed_precision = "no" if args.tiny else "bf16"
    report: dict[str, Any] = {**environment(args.tiny), "results": []}
    name = report["device"].lower().replace(" ", "-")
    stamp = report["date"][:19].replace(":", "").replace("-", "")
    target = args.output_dir / f"sdxl-dpo-step-{name}-{stamp}.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for case in args.cases:
        report["results"].append(measure(case, args))
        log.info("%s", json.dumps(report["results"][-1]))
        target.write_text(json.dumps(report, indent=2))  # after each case: the next may run out of memory
        gc.collect()
        if not args.tiny:
            torch.cuda.empty_cache()
    log.info("written to %s", target)
    return target


if __name__ == "__main__":
    main()

"""What measurements on SDXL at its true size share: the model, their common options and the file of their results."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # tests.tiny and the published configurations

from tests.pipelines.full_size import SDXL_UNET  # noqa: E402
from tests.tiny import NOISE, tiny_tokenizer  # noqa: E402

log = logging.getLogger("full_size")
GIB = 2**30


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


def options(description: str | None, cases: Iterable[str]) -> argparse.ArgumentParser:
    """A parser with what every such measurement can be told."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), default=None, help="bf16; fp32 with --tiny"
    )
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--attention", choices=("sdpa", "xformers", "eager"), default="sdpa")
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU, to exercise this script")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
    return parser


def measure_cases(
    name: str,
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    measure: Callable[[str, argparse.Namespace], dict[str, Any]],
) -> Path:
    """Measure the cases one by one; returns the file of results, ``NAME-DEVICE-DATE.json``."""
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; run this on a GPU, or with --tiny to try the script.")
    if args.mixed_precision is None:
        args.mixed_precision = "no" if args.tiny else "bf16"
    report: dict[str, Any] = {**environment(args.tiny), "results": []}
    device = report["device"].lower().replace(" ", "-")
    stamp = report["date"][:19].replace(":", "").replace("-", "")
    target = args.output_dir / f"{name}-{device}-{stamp}.json"
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

"""How much faster a scorer's batches are than a loop over single pictures, as a ratio in one run.

    python benchmarks/scorer_throughput.py --architecture ViT-B-32 --pictures 32

The network is open_clip's true architecture with random weights, which cost the same as trained ones. The loop and the
batches alternate, so the machine's drift hits both alike; the median ratio over rounds is reported, of wall time and,
for a CPU that others use too, of processor time. The last ratio is against what many scripts do instead: load the
weights again for every picture.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image

from reward_models import load_reward_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=512, help="pixels of the square pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()

    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(0, 256, (args.side, args.side, 3), dtype=np.uint8))
        for _ in range(args.pictures)
    ]
    prompts = [f"picture number {n}" for n in range(args.pictures)]
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.pt"
        torch.save(
            {"state_dict": open_clip.CLIP(**open_clip.get_model_config(args.architecture)).state_dict()}, weights
        )

        def load() -> object:
            return load_reward_model(
                "hpsv2",
                checkpoint=weights,
                architecture=args.architecture,
                dtype=getattr(torch, args.dtype),
                batch_size=args.batch_size,
            )

        loaded = []
        loading, _ = seconds(lambda: loaded.append(load()))
        scorer = loaded[0]
    scorer.score(images[: args.batch_size], prompts[: args.batch_size])  # warm up

    def one_by_one() -> None:
        for image, prompt in zip(images, prompts, strict=True):
            scorer.score([image], [prompt])

    ratios, processor, batched = [], [], []
    for _ in range(args.rounds):
        (alone, alone_processor), (together, together_processor) = (
            seconds(one_by_one),
            seconds(lambda: scorer.score(images, prompts)),
        )
        ratios.append(alone / together)
        processor.append(alone_processor / together_processor)
        batched.append(args.pictures / together)
    per_second = statistics.median(batched)
    result = {
        "architecture": args.architecture,
        "device": scorer.device,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "dtype": args.dtype,
        "pictures": args.pictures,
        "batch_size": args.batch_size,
        "pictures_per_second": round(per_second, 2),
        "batches_over_loop": round(statistics.median(ratios), 2),
        "batches_over_loop_processor_time": round(statistics.median(processor), 2),
        "batches_over_reloading_loop": round((loading + statistics.median(ratios) / per_second) * per_second, 1),
        "rounds": [round(ratio, 2) for ratio in ratios],
        "rounds_processor_time": [round(ratio, 2) for ratio in processor],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time; a score is on the CPU, so the work is done when the call returns."""
    started, worked = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - started, time.process_time() - worked


if __name__ == "__main__":
    main()

"""How much faster a served judge answers when all pairs are given at once than one pair at a time, as a ratio.

    python benchmarks/judge_throughput.py --answer-seconds 2 --slots 8

The server is a real one over HTTP on this machine, and speaks OpenAI's interface. It thinks of nothing: every answer
takes ``--answer-seconds``, and at most ``--slots`` are under way at once, as in a server that batches. What is measured
is thus the client: how well it keeps a server busy. The bound of the ratio is ``slots / 2``, as even a single pair is
asked in both orders at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

from reward_models import load_reward_model
from tests.reward_models.unified_reward.judge_server import Asked, JudgeServer, Reply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--side", type=int, default=512, help="pixels of the square pictures")
    parser.add_argument("--answer-seconds", type=float, default=2.0)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file of the result")
    args = parser.parse_args()

    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (2 * args.pairs, args.side, args.side, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in noise]
    pairs = list(zip(images[::2], images[1::2], strict=True))
    prompts = [f"picture number {n}" for n in range(args.pairs)]
    slots = threading.Semaphore(args.slots)

    def behaviour(asked: Asked) -> Reply:
        with slots:
            time.sleep(args.answer_seconds)
        first, second = (image.getpixel((0, 0)) for image in asked.images)
        return Reply(f"Image {1 if first > second else 2} is better")

    loops, together = [], []
    with JudgeServer(behaviour) as server:
        options = {"backend": "server", "base_url": server.url, "concurrency": 2 * args.slots}
        for _ in range(args.rounds):  # a new judge each time: answers are remembered
            judge = load_reward_model("unified-reward", **options)
            started = time.perf_counter()
            for pair, prompt in zip(pairs, prompts, strict=True):
                judge.compare([pair], [prompt])
            loops.append(time.perf_counter() - started)
            judge = load_reward_model("unified-reward", **options)
            started = time.perf_counter()
            judge.compare(pairs, prompts)
            together.append(time.perf_counter() - started)
    ratios = [loop / one for loop, one in zip(loops, together, strict=True)]
    result = {
        "pairs": args.pairs,
        "side": args.side,
        "answer_seconds": args.answer_seconds,
        "slots": args.slots,
        "load_average": round(os.getloadavg()[0], 1),
        "pairs_per_second": round(args.pairs / statistics.median(together), 2),
        "together_over_loop": round(statistics.median(ratios), 2),
        "bound": args.slots / 2,
        "rounds": [round(ratio, 2) for ratio in ratios],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

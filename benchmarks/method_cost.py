"""What a step of each method costs beside Diffusion-DPO's, as ratios in one run on the embedded model.

    python benchmarks/method_cost.py

All trainers live in one process and step in turn, so the machine's drift hits them all alike; each ratio is taken
within a round, and the median over rounds is reported. Seconds are the process's own, which other work on the machine
does not change. A step is 8 pairs, or 8 or 4 lists of 4.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffalign.config import METHODS, load_object, trainer_class
from diffalign.data import PreferenceDataset, load_preferences
from diffalign.shapes import render, sample_caption


@dataclass(frozen=True)
class Case:
    """A method with its settings."""

    title: str
    method: str
    settings: dict[str, Any]
    warm_up: int = 2


SMPO = {"inversion_steps": 10, "score": "checker"}
CASES = {
    "dpo": Case("DPO, full weights", "dpo", {}),
    "mapo": Case("MaPO: no reference", "mapo", {}),
    "dpo-precomputed": Case("DPO, reference precomputed", "dpo", {"precompute_reference": 1}),
    "dpo-channels-last": Case("DPO, channels_last", "dpo", {"channels_last": True}),
    "dpo-parts": Case("DPO, images_per_pass=4", "dpo", {"images_per_pass": 4}),
    "smpo": Case("SmPO, inversions fresh", "smpo", SMPO),
    "smpo-cached": Case("SmPO, inversions cached", "smpo", SMPO | {"draws_per_row": 1}, warm_up=6),
    "smpo-precomputed": Case("SmPO, all precomputed", "smpo", SMPO | {"precompute_reference": 1}),
    "rankdpo": Case("RankDPO, 8 lists of 4", "rankdpo", {}),
    "rankdpo-same-images": Case("RankDPO, 4 lists of 4 (as many images)", "rankdpo", {"batch_size": 4}),
}


def table(rows: int) -> PreferenceDataset:
    """Rows of four renders in a clean order."""
    rng = np.random.default_rng(0)
    captions = [sample_caption(rng) for _ in range(rows)]
    order = [1.0, 2 / 3, 1 / 3, 0.0]
    return load_preferences(
        [
            {
                "prompt": f"{caption} {number}",
                "images": [render(caption, rng) for _ in order],
                "preference": order,
                "scores": {"checker": order},
            }
            for number, caption in enumerate(captions)
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/method_cost.json"))
    args = parser.parse_args()
    logging.getLogger("diffalign").setLevel(logging.ERROR)
    rows = table(32)
    names = list(dict.fromkeys(["dpo", *args.cases]))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for name in names:
            case = CASES[name]
            config = load_object(METHODS[case.method].config)(
                **({"batch_size": 8} | case.settings),
                **{"output_dir": f"{folder}/{name}", "cache_dir": f"{folder}/cache", "adapter": "none"},
                **{"max_steps": 10**6, "progress_bar": False, "learning_rate": 1e-6},
            )
            trainers[name] = trainer_class(case.method)("shapes", config, train_dataset=rows)
            for _ in range(case.warm_up):
                trainers[name].optimizer_step()
        for number in range(args.rounds):
            for name in names if number % 2 else reversed(names):  # nobody always steps after the same neighbour
                began = time.process_time()
                trainers[name].optimizer_step()
                seconds[name].append(time.process_time() - began)
    result: dict[str, Any] = {"date": str(date.today()), "torch": torch.__version__, "diffusers": diffusers.__version__}
    result |= {"threads": torch.get_num_threads(), "rounds": args.rounds}
    result["dpo_cpu_seconds"] = round(statistics.median(seconds["dpo"]), 4)
    result["ratio_to_dpo"] = {
        name: round(statistics.median(own / dpo for own, dpo in zip(seconds[name], seconds["dpo"], strict=True)), 3)
        for name in names
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print("| step | ratio to DPO |\n|---|---|")
    for name, ratio in result["ratio_to_dpo"].items():
        print(f"| {CASES[name].title} | {ratio:.2f} |")


if __name__ == "__main__":
    main()

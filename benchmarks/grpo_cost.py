"""What Pref-GRPO's machinery costs on the embedded model, as ratios within one run.

    python benchmarks/grpo_cost.py

- rollout: pictures a second of a rollout against `pipe()` with the same steps, guidance and batch, decoding included;
- update: an optimizer step against the bare forward and backward passes of as many (picture, step) pairs;
- judging: calls of each pairing against a full round robin, for groups of several sizes.

Both sides of a ratio run in turn in the same process; the median over rounds is reported.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffalign import PrefGRPOConfig, PrefGRPOTrainer
from diffalign.synthesis import generate_images
from diffalign.trainers.grpo.win_rate import ask_scores, win_rates

SIZES = (8, 9, 16, 24)


def seconds_of(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def bare_passes(trainer: PrefGRPOTrainer, pictures: int, steps: int) -> None:
    """As many guided forward and backward passes as an update makes, and the optimizer's step: nothing else."""
    denoiser, batch = trainer.denoiser, trainer.config.batch_size
    samples = [trainer.sample_of(0, n) for n in range(batch)]
    conditioning, sizes = trainer.sampling.conditioning(samples, trainer.accelerator.device)
    x = torch.randn(2 * batch, *trainer.sampling.shape)
    time_ = torch.full((2 * batch,), 500.0)
    for _ in range(pictures // batch * steps):
        empty, full = trainer.adapter.predict(denoiser, x, time_, conditioning, sizes).chunk(2)
        (empty + 3.0 * (full - empty)).square().mean().mul(1e-9).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def judge_calls() -> dict[str, dict[str, int]]:
    calls: dict[str, dict[str, int]] = {}
    for size in SIZES:
        ask = ask_scores(torch.randperm(size, generator=torch.Generator().manual_seed(0)).float())
        options = {"round_robin": None, "opponents": 4, "tournament": None}
        calls[str(size)] = {
            name: int(win_rates(ask, size, 0, schedule=name, opponents=number).stats["calls"])
            for name, number in options.items()
        }
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/grpo_cost.json"))
    args = parser.parse_args()
    logging.getLogger("diffalign").setLevel(logging.ERROR)
    pictures, steps, trained = 16, 12, 2
    with tempfile.TemporaryDirectory() as folder:
        config = PrefGRPOConfig(
            **{"output_dir": folder, "max_steps": 10**4, "prompts_per_rollout": 2, "group_size": 8, "batch_size": 16},
            **{"sampling_steps": steps, "guidance_scale": 3.0, "timestep_fraction": trained / (steps - 2)},
            **{"rewards": ["shapes"], "adapter": "none", "progress_bar": False, "learning_rate": 1e-9},
        )
        trainer = PrefGRPOTrainer("shapes", config, ["a red circle", "two blue crosses"])
        prompts = [trainer.sample_of(0, n).prompt for n in range(pictures)]
        rows: list[dict[str, float]] = []
        for number in range(args.rounds + 1):
            row = {"bare": seconds_of(lambda: bare_passes(trainer, pictures, trained))}
            row["pipe"] = seconds_of(
                lambda: generate_images(
                    trainer.pipeline, prompts, list(range(pictures)), steps=steps, guidance=3.0, batch_size=pictures
                )
            )
            metrics = trainer.optimizer_step()
            row |= {name: metrics[f"time/{name}"] for name in ("sampling", "training", "step", "shapes")}
            row["waiting"] = metrics["time/waiting_for_rewards"]
            if number:  # the first round warms up
                rows.append(row)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(row[a] / row[b] for row in rows), 3)

    result: dict[str, Any] = {"date": str(date.today()), "torch": torch.__version__, "diffusers": diffusers.__version__}
    result |= {"threads": torch.get_num_threads(), "rounds": args.rounds, "pictures": pictures}
    result |= {"rollout_to_pipe": ratio("sampling", "pipe"), "update_to_bare": ratio("training", "bare")}
    result |= {"judge_share": ratio("shapes", "step"), "waiting_share": ratio("waiting", "step")}
    result["judge_calls"] = judge_calls()
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

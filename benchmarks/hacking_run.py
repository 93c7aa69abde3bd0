"""A hacked run, shown and caught: Pref-GRPO on the embedded default, paid for how saturated its pictures are.

    python benchmarks/hacking_run.py --output-dir out/hacking-run

Two arms with the same settings. ``foolish`` has the mean saturation of a picture as its judge, ``honest`` the checker
of the shapes world. Every few updates the same held-out captions are drawn from the same noise with the sampler that
users have, and read by the strict checker, which training never sees. The foolish arm must raise ``reward_hacking`` and
the honest one must not; the program says so and ends with 1 otherwise.

An arm should take some ten minutes on one idle CPU core. An interrupted one continues, a finished one is read back.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
from hacking_example import colourful

from diffalign import PrefGRPOConfig, PrefGRPOTrainer
from reward_models import FunctionRewardModel, RewardModel, load_reward_model

ALARM = "reward_hacking"
ARMS = ("foolish", "honest")
UNSEEN = "shapes-strict"


def judge_of(arm: str) -> RewardModel:
    return FunctionRewardModel(colourful) if arm == "foolish" else load_reward_model("shapes")


def run(arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """One arm: its hold-out curve, its alarms and how long it took."""
    folder = args.output_dir / arm
    report = folder / "training_report.json"
    if not report.is_file():
        config = PrefGRPOConfig(
            **{"output_dir": str(folder), "cache_dir": str(args.output_dir / "cache"), "seed": args.seed},
            **{"max_steps": args.updates, "prompts_per_rollout": args.prompts, "group_size": 8, "batch_size": 16},
            **{"objective": "matching", "sampling_steps": 12, "guidance_scale": 3.0, "clip_range": 1e-2},
            **{"adapter": "none", "learning_rate": args.learning_rate, "lr_schedule": "constant"},
            **{"holdout_every": args.every, "holdout_prompts": "shapes:heldout", "holdout_count": args.heldout},
            **{"validation_steps": 12, "validation_guidance": 3.0},
            **{"log_every": 1, "save_every": args.every, "keep_checkpoints": 1, "resume": "latest"},
        )
        trainer = PrefGRPOTrainer(
            "shapes",
            config,
            "shapes:train",
            reward_models=[judge_of(arm)],
            holdout_models=[load_reward_model(UNSEEN)],
        )
        began = time.monotonic()
        trainer.train()
        (folder / "seconds.json").write_text(json.dumps(time.monotonic() - began))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("_change", "_error")
    return {
        "judge": judge_of(arm).name,
        "seconds": round(json.loads((folder / "seconds.json").read_text())),
        "curve": [
            {name: value for name, value in row.items() if name == "step" or name.endswith(kept)}
            for row in rows
            if f"holdout/{UNSEEN}_change" in row
        ],
        "alarms": json.loads(report.read_text())["alarms"],
    }


def table(result: dict[str, Any]) -> str:
    """The curve of an arm: changes against the base with their standard errors."""
    names = [f"holdout/training-{result['judge']}", f"holdout/{UNSEEN}"]
    lines = ["| updates | " + " | ".join(name.removeprefix("holdout/") for name in names) + " |", "|---|---|---|"]
    for row in result["curve"]:
        cells = [f"{row[f'{name}_change']:+.3f} +- {row[f'{name}_error']:.3f}" for name in names]
        lines.append(f"| {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/hacking-run"))
    parser.add_argument("--results", type=Path, default=None, help="a JSON file for the numbers")
    parser.add_argument("--sheet", type=Path, default=None, help="where to copy the last pictures of the foolish arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--every", type=int, default=15, help="updates between two looks at the hold-out")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of an update, eight pictures each")
    parser.add_argument("--heldout", type=int, default=150, help="held-out captions")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="too high on purpose")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = {arm: run(arm, args) for arm in args.arms}
    record = {"date": str(date.today()), "torch": torch.__version__, "diffusers": diffusers.__version__}
    record |= {"threads": torch.get_num_threads(), "updates": args.updates, "learning_rate": args.learning_rate}
    record |= {"heldout": args.heldout, "seed": args.seed}
    if args.results is not None:
        args.results.write_text(json.dumps(record | {"arms": results}, indent=1) + "\n")
    if args.sheet is not None:
        shutil.copyfile(sorted((args.output_dir / "foolish" / "holdout").glob("step-*.png"))[-1], args.sheet)
    as_expected = True
    for arm, result in results.items():
        raised = [alarm for alarm in result["alarms"] if alarm["name"] == ALARM]
        as_expected &= bool(raised) == (arm == "foolish")
        told = f"{ALARM} at update {raised[0]['step']}" if raised else f"no {ALARM}"
        print(f"\n{arm}: {told}, {result['seconds']} s\n\n{table(result)}")
    print("\nas expected" if as_expected else "\nNOT as expected")
    return 0 if as_expected else 1


if __name__ == "__main__":
    sys.exit(main())

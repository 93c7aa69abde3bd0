"""The generator at work: 1,000 prompts x 4 pictures from two checkpoints x three scorers, then DPO and RankDPO on them.

    python benchmarks/study_generate.py                     # hours on 2 cores; continues where it was stopped
    python benchmarks/study_generate.py --prompts 40 --steps 20 --heldout-prompts 40     # a try

The second checkpoint is the base after the quickstart's own DPO, so that this is also a second round. What is compared
with the base is measured on held-out prompts, as in the quickstart. Results: ``OUTPUT/study.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from diffalign import quickstart
from diffalign.data import load_preferences
from diffalign.synthesis.config import GenerationConfig
from diffalign.synthesis.policy import with_policy
from diffalign.synthesis.run import generate
from reward_models import available_reward_models


def main() -> None:
    arguments = parse_arguments()
    folder: Path = arguments.output_dir
    began = time.perf_counter()
    first = quickstart.run(
        folder / "quickstart", seed=arguments.seed, heldout_prompts=arguments.heldout_prompts,
        overrides=arguments.overrides(), **({"prompts": arguments.prompts} if arguments.prompts < 320 else {}),
    )  # fmt: skip
    base = {"name": "base", "model": "shapes", "images": 2, "steps": 12, "guidance": 3.0, "batch_size": 32}
    config = GenerationConfig(
        output_dir=str(folder / "table"), prompts="shapes", max_prompts=arguments.prompts, seed=arguments.seed,
        pipelines=[base], reward_models=arguments.reward_models,
    )  # fmt: skip
    made = generate(with_policy(config, folder / "quickstart" / "run"))
    results: dict[str, Any] = {"generation": made, "quickstart": first["scores"]}
    for recipe in ("shapes-dpo", "shapes-rankdpo"):
        run = folder / recipe
        quickstart.train(
            folder / "table", run, arguments.seed, arguments.overrides(),
            dataset=load_preferences(folder / "table"), recipe=recipe,
        )  # fmt: skip
        settings = quickstart.Settings(seed=arguments.seed, heldout_prompts=arguments.heldout_prompts)
        results[recipe] = quickstart.measure(run, run / "evaluation", settings)["scores"]
    results["seconds"] = time.perf_counter() - began
    (folder / "study.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


class Arguments(argparse.Namespace):
    """Parsed arguments."""

    steps: int | None

    def overrides(self) -> list[str]:
        """Training settings in place of the recipes'."""
        return [] if self.steps is None else [f"max_steps={self.steps}"]


def known_scorers() -> list[str]:
    """The embedded default's scorers that are installed."""
    return [name for name in ("shapes", "shapes-strict", "shapes-judge") if name in available_reward_models()]


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description="The generator end to end on the embedded default.")
    parser.add_argument("--output-dir", type=Path, default=Path("out/study-generate"))
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--heldout-prompts", type=int, default=600)
    parser.add_argument("--steps", type=int, default=None, help="training steps in place of the recipes' own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reward-models", nargs="+", default=known_scorers())
    return parser.parse_args(namespace=Arguments())


if __name__ == "__main__":
    main()

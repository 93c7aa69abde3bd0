"""Reward hacking on purpose: DPO on the embedded default with a foolish reward, the mean saturation of a picture.

    python benchmarks/hacking_example.py --output-dir out/hacking

Draws a table, trains on it with settings that are known to be too strong, and evaluates with the checker of the shapes
world as the hold-out score. The pictures and numbers of docs/reading-results.md come from it. Finished stages are kept.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLING = {"steps": 12, "guidance": 3.0, "batch_size": 32}


def colourful(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Mean saturation in [0, 1]; the prompts do not matter."""
    return [float(np.asarray(image.convert("HSV"), dtype=float)[..., 1].mean() / 255) for image in images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/hacking"))
    parser.add_argument("--prompts", type=int, default=160, help="training prompts, six pictures each")
    parser.add_argument("--steps", type=int, default=200, help="training steps")
    parser.add_argument("--heldout", type=int, default=40, help="evaluation prompts, two pictures each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    from diffalign.config import dump, load_job, trainer_class
    from diffalign.data import load_preferences
    from diffalign.evaluation import evaluate
    from diffalign.pipelines import load_pipeline
    from diffalign.shapes import sample_captions
    from diffalign.synthesis import build_preferences
    from reward_models import load_reward_model

    table, run = arguments.output_dir / "table", arguments.output_dir / "run"
    scorers = [load_reward_model("shapes"), load_reward_model(colourful)]
    if not any(table.glob("*.parquet")):
        captions = sample_captions(arguments.prompts, seed=1000 + arguments.seed)
        build_preferences(
            load_pipeline("shapes"),
            captions,
            images_per_prompt=6,
            reward_models=scorers,
            folder=table,
            seed=arguments.seed,
            **SAMPLING,
        )
    job, config = load_job(
        "shapes-dpo",
        [
            *(f"dataset={table}", "dataset_score=colourful", f"output_dir={run}", f"seed={arguments.seed}"),
            *(f"max_steps={arguments.steps}", "learning_rate=1e-4", "min_timestep=0", "min_margin=0.0"),
            "resume=latest",
        ],
    )
    trainer = trainer_class(job.method)("shapes", config, train_dataset=load_preferences(table, score="colourful"))
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(dump(job, config), encoding="utf-8")
    trainer.train()
    trainer.save_model()
    evaluate(
        "shapes",
        run,
        "shapes:heldout",
        output_dir=arguments.output_dir / "evaluation",
        num_prompts=arguments.heldout,
        seeds=2,
        reward_models=["shapes-strict", load_reward_model(colourful)],
        progress=True,
        **SAMPLING,
    )


if __name__ == "__main__":
    main()

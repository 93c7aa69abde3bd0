"""Does guidance with a Self-NPO model help on the embedded default? Strict correctness over guidance scales.

    python benchmarks/study_npo.py --seeds 0 1 2 --output-dir out/study-npo

Each arm trains a negative model from prompts (recipe shapes-selfnpo) and draws held-out prompts with it in the
unconditional branch; plain guidance draws the same prompts from the same noise at the same scales. ``npo`` trains on
reversed preferences instead (recipe shapes-npo). The arms ``dpo-...`` do the same around a model aligned by the recipe
shapes-dpo, whose change is in both branches (alpha = 1). Finished stages are skipped when it is run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from record import run_record

log = logging.getLogger("study_npo")
SCORES = ("shapes-strict", "shapes")


@dataclass(frozen=True)
class Arm:
    """A negative model, and how it is used.

    Args:
        title: in the table.
        trained: folder of the negative model's run; empty for plain guidance.
        recipe, overrides: how it is trained.
        guidance: settings of ``negative_guidance``.
        aligned: whether the pictures are those of the model aligned by shapes-dpo.
        beside: the arm that it is compared with.
    """

    title: str
    trained: str = ""
    recipe: str = "shapes-selfnpo"
    overrides: tuple[str, ...] = ()
    guidance: tuple[tuple[str, Any], ...] = ()
    aligned: bool = False
    beside: str = "plain"


TEACHER = ("teacher_guidance=-4",)
ARMS = {
    "plain": Arm("plain guidance"),
    "teacher1": Arm("Self-NPO, teacher guidance 1", "teacher1", overrides=("teacher_guidance=1",)),
    "teacher0": Arm("Self-NPO, teacher guidance 0", "teacher0", overrides=("teacher_guidance=0",)),
    "teacher-4": Arm("Self-NPO, teacher guidance -4", "teacher-4", overrides=TEACHER),
    "half-4": Arm("the same, beta = 0.5", "teacher-4", overrides=TEACHER, guidance=(("beta", 0.5),)),
    "npo": Arm("Diffusion-NPO (reversed DPO)", "npo", recipe="shapes-npo"),
    "dpo": Arm("DPO, plain guidance", aligned=True),
    "dpo-half-4": Arm(
        "DPO and Self-NPO, teacher guidance -4, beta = 0.5",
        "teacher-4",
        overrides=TEACHER,
        guidance=(("alpha", 1.0), ("beta", 0.5)),
        aligned=True,
        beside="dpo",
    ),
    "dpo-npo": Arm(
        "DPO and Diffusion-NPO",
        "npo",
        recipe="shapes-npo",
        guidance=(("alpha", 1.0),),
        aligned=True,
        beside="dpo",
    ),
}
ALIGNED = Arm("", "dpo", recipe="shapes-dpo")


def work(root: Path, seed: int, name: str, prompts: int, scales: list[float], steps: int) -> None:
    """Train an arm's model if it is not there, then draw and score its pictures at every scale."""
    began = time.monotonic()
    from diffalign.evaluation.compare import SamplingSettings, draw
    from diffalign.guidance import negative_guidance
    from diffalign.pipelines import load_pipeline
    from diffalign.shapes import sample_captions
    from reward_models import load_reward_model

    arm, folder = ARMS[name], root / f"seed-{seed}"
    for run in [arm] * bool(arm.trained) + [ALIGNED] * arm.aligned:
        if not (folder / run.trained / "final").is_dir():
            train(root, folder / run.trained, seed, run)
    positive = folder / ALIGNED.trained if arm.aligned else None
    texts = sample_captions(prompts, seed=2000 + seed, held_out=True)
    scorers = [load_reward_model(score) for score in SCORES]
    for scale in scales:
        file = folder / "scores" / f"{name}-{scale:g}-{prompts}.json"
        if file.is_file():
            continue
        if arm.trained:
            pipe = load_pipeline("shapes")
            context = negative_guidance(pipe, folder / arm.trained, positive, **dict(arm.guidance))
        else:
            pipe, context = load_pipeline(str(positive / "final") if positive else "shapes"), nullcontext()
        with context:
            pictures = draw(pipe, texts, [0], SamplingSettings(steps, scale, 32))
        scores = {model.name: model.score(pictures, texts).tolist() for model in scorers}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(scores))
        pictures[0].save(file.with_suffix(".png"))
    log.info("seed %d %s: %.0f s", seed, name, time.monotonic() - began)


def train(root: Path, run: Path, seed: int, arm: Arm) -> None:
    """The negative model of an arm."""
    from diffalign.config import load_job, trainer_class

    data = []
    if arm.recipe != "shapes-selfnpo":
        from diffalign.quickstart import Settings, make_preferences

        make_preferences(root / f"seed-{seed}" / "preferences", Settings(seed=seed))
        data = [f"dataset={root / f'seed-{seed}' / 'preferences'}"]
    fixed = [f"output_dir={run}", f"seed={seed}", f"cache_dir={root / 'cache'}", "resume=latest", "alarms=false"]
    job, config = load_job(arm.recipe, [*data, *fixed, "progress_bar=false", *arm.overrides])
    trainer_class(job.method)("shapes", config, train_dataset=job.dataset).train()


def collect(root: Path, seeds: list[int], arms: list[str], prompts: int, scales: list[float]) -> dict[str, Any]:
    """Paired statistics by arm, scale and score; every arm against the one it stands beside at the same scale."""
    from diffalign.evaluation.statistics import compare_paired

    results: dict[str, Any] = {}
    for arm in arms:
        for scale in scales:
            cell = results.setdefault(arm, {}).setdefault(f"{scale:g}", {})
            for score in SCORES:
                drawn = {
                    which: [values_of(root, seed, which, scale, prompts, score) for seed in seeds]
                    for which in (ARMS[arm].beside, arm)
                }
                base, its = (list(chain.from_iterable(drawn[which])) for which in (ARMS[arm].beside, arm))
                keys = [(seed, i) for seed in seeds for i in range(prompts)]
                cell[score] = compare_paired(base, its, keys).to_json()
                cell[score]["seeds"] = {
                    str(seed): compare_paired(*parts, range(prompts)).to_json()["difference"]
                    for seed, *parts in zip(seeds, drawn[ARMS[arm].beside], drawn[arm], strict=True)
                }
    return results


def values_of(root: Path, seed: int, arm: str, scale: float, prompts: int, score: str) -> list[float]:
    """Scores of one cell's pictures."""
    file = root / f"seed-{seed}" / "scores" / f"{arm}-{scale:g}-{prompts}.json"
    return json.loads(file.read_text())[score]


def markdown(results: dict[str, Any], scales: list[float], score: str = "shapes-strict") -> str:
    """A table of one score."""
    lines = ["| | " + " | ".join(f"scale {scale:g}" for scale in scales) + " |", "|---|" + "---|" * len(scales)]
    for arm, cells in results.items():
        row = []
        for scale in scales:
            pooled = cells[f"{scale:g}"][score]
            low, high = pooled["difference"]["ci95"]
            change = f" ({pooled['difference']['mean']:+.3f} [{low:+.3f}, {high:+.3f}])"
            row.append(f"{pooled['aligned']:.3f}" + (change if arm != ARMS[arm].beside else ""))
        lines.append(f"| {ARMS[arm].title} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/study-npo"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/npo.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS)[1:], default=[name for name in ARMS if name != "plain"])
    parser.add_argument("--scales", type=float, nargs="+", default=[1.5, 3.0, 6.0])
    parser.add_argument("--prompts", type=int, default=400, help="held-out prompts a seed")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    import torch

    torch.set_num_threads(args.threads)
    arms = ["plain", *args.arms]
    for seed in args.seeds:
        for arm in arms:
            work(args.output_dir, seed, arm, args.prompts, args.scales, args.steps)
    record = run_record() | {"seeds": args.seeds, "prompts": args.prompts, "steps": args.steps}
    results = collect(args.output_dir, args.seeds, arms, args.prompts, args.scales)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(record | {"results": results}, indent=1))
    for score in SCORES:
        print(f"{score}\n\n{markdown(results, args.scales, score)}")


if __name__ == "__main__":
    main()

"""The proof on the embedded default: Diffusion-DPO against its controls, three seeds of data and training.

    python benchmarks/study_dpo.py --output-dir out/study-dpo

Each seed draws its own prompts and pictures, trains three arms on the same rows, steps and random draws - DPO, SFT on
the winners, DPO on preferences shuffled within each row - and evaluates each on fresh prompts of held-out and of seen
combinations, paired with the base by prompt and noise. Stages that are finished are skipped when it is run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.quickstart import Settings

log = logging.getLogger("study_dpo")
ARMS = {
    "dpo": "Diffusion-DPO",
    "sft": "SFT on the winners (control)",
    "shuffled": "DPO on shuffled preferences (control)",
}
SPLITS = {"held-out": True, "seen": False}


# --- one unit of work, in a process of its own -------------------------------------------------------------------


def work(root: Path, seed: int, arm: str, prompts: int) -> None:
    """The pictures that all arms of a seed share (arm ``data``), or training and evaluation of one arm."""
    from diffalign.quickstart import Settings, make_preferences, train

    settings = Settings(seed=seed, heldout_prompts=prompts)
    folder = root / f"seed-{seed}"
    dataset = make_preferences(folder / "preferences", settings)
    if arm == "data":
        for split in SPLITS:
            pictures("shapes", split, settings, folder / "base" / split)
        return
    if arm == "shuffled":
        dataset = dataset.with_shuffled_preferences(seed)
    run = folder / arm
    if not (run / "training_report.json").is_file():
        method = "sft" if arm == "sft" else None
        train(folder / "preferences", run, seed, ["alarms=false"], dataset=dataset, method=method)
    for split in SPLITS:
        if not (run / split / "report.json").is_file():
            measure(folder / "base" / split, run, split, settings)


def captions(split: str, settings: Settings) -> list[str]:
    """Evaluation prompts of a split; held-out ones name a combination that no training data contains."""
    from diffalign.shapes import sample_captions

    key = (2000 if SPLITS[split] else 3000) + settings.seed
    return sample_captions(settings.heldout_prompts, seed=key, held_out=SPLITS[split])


def pictures(model: str, split: str, settings: Settings, folder: Path) -> list[Path]:
    """One picture per evaluation prompt, drawn or found."""
    from diffalign.evaluation.compare import SamplingSettings, draw
    from diffalign.pipelines import load_pipeline

    texts = captions(split, settings)
    found = sorted(folder.glob("*.png"))
    if len(found) == len(texts):
        return found
    sampling = SamplingSettings(settings.steps, settings.guidance, settings.batch_size)
    return draw(load_pipeline(model), texts, [0], sampling, folder)


def measure(base: Path, run: Path, split: str, settings: Settings) -> None:
    """Compare an arm with the base on one split and write the report."""
    from diffalign.evaluation.compare import SamplingSettings, compare_pictures
    from diffalign.evaluation.report import write_report
    from reward_models import load_reward_model

    comparison = compare_pictures(
        captions(split, settings),
        [0],
        sorted(base.glob("*.png")),
        pictures(str(run / "final"), split, settings, run / split / "pictures"),
        [load_reward_model("shapes-strict"), load_reward_model("shapes")],
        sampling=SamplingSettings(settings.steps, settings.guidance, settings.batch_size),
    )
    write_report(comparison, run / split, method=run.name, base_name="shapes", aligned_name=run.name)


def launch(root: Path, seed: int, arm: str, prompts: int, threads: int) -> None:
    """Run a unit as a subprocess with its own share of the processor."""
    root.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--output-dir", str(root), "--prompts", str(prompts)]
    began = time.monotonic()
    with (root / f"seed-{seed}-{arm}.log").open("ab") as output:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(
            [*command, "--work", str(seed), arm], check=True, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    log.info("seed %d %s: %.0f s", seed, arm, time.monotonic() - began)


# --- the table ---------------------------------------------------------------------------------------------------


def collect(root: Path, seeds: list[int], arms: list[str]) -> dict[str, Any]:
    """Results by arm and split: each seed's own report, and all seeds pooled."""
    from diffalign.evaluation.statistics import compare_paired

    results: dict[str, Any] = defaultdict(dict)
    for arm in arms:
        for split in SPLITS:
            base: list[float] = []
            aligned: list[float] = []
            prompts: list[tuple[int, str]] = []
            single = {}
            for seed in seeds:
                folder = root / f"seed-{seed}" / arm / split
                single[str(seed)] = json.loads((folder / "report.json").read_text())["scores"]
                for line in (folder / "pairs.jsonl").read_text().splitlines():
                    pair = json.loads(line)
                    base.append(pair["base"]["shapes-strict"])
                    aligned.append(pair["aligned"]["shapes-strict"])
                    prompts.append((seed, pair["prompt"]))
            pooled = compare_paired(base, aligned, prompts).to_json()
            results[arm][split] = {"seeds": single, "pooled": pooled}
    return dict(results)


def markdown(results: dict[str, Any], record: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Diffusion-DPO on the embedded default",
        "",
        f"`make study-dpo`, {record['date']}, commit {record['commit']}, {record['machine']}, torch {record['torch']}. "
        f"{record['minutes']:.0f} minutes.",
        "",
        "Strict correctness: every claim of the caption holds. Paired by prompt and noise with the base; 95 % "
        f"bootstrap intervals; {record['prompts']} prompts a cell and seed. Each seed has its own prompts, pictures "
        "and training.",
        "",
        "| arm | captions | "
        + " | ".join(f"seed {s}" for s in record["seeds"])
        + " | base | aligned | pooled difference |",
        "|---|---|" + "---|" * (len(record["seeds"]) + 3),
    ]
    for arm, splits in results.items():
        for split, cell in splits.items():
            each = [signed(scores["shapes-strict"]["difference"]) for scores in cell["seeds"].values()]
            pooled = cell["pooled"]
            numbers = f"{pooled['base']:.3f} | {pooled['aligned']:.3f} | **{signed(pooled['difference'])}**"
            lines.append(f"| {ARMS[arm]} | {split} | {' | '.join(each)} | {numbers} |")
    return "\n".join(lines) + "\n"


def signed(difference: dict[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/study-dpo"))
    parser.add_argument("--results-dir", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--prompts", type=int, default=420, help="evaluation prompts a split, arm and seed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="units of work at the same time")
    parser.add_argument("--work", nargs=2, metavar=("SEED", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.work:
        work(args.output_dir, int(args.work[0]), args.work[1], args.prompts)
        return
    began = time.monotonic()
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        data = {s: pool.submit(launch, args.output_dir, s, "data", args.prompts, threads) for s in args.seeds}
        units = []
        for seed in args.seeds:
            data[seed].result()
            units += [pool.submit(launch, args.output_dir, seed, arm, args.prompts, threads) for arm in args.arms]
        for unit in units:
            unit.result()
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    record = {
        "date": str(date.today()),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{os.cpu_count()} {platform.machine()} CPU cores",
        "torch": torch.__version__,
        "minutes": (time.monotonic() - began) / 60,
        "seeds": args.seeds,
        "prompts": args.prompts,
    }
    results = collect(args.output_dir, args.seeds, args.arms)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / "study-dpo.json").write_text(json.dumps(record | {"results": results}, indent=1))
    (args.results_dir / "study-dpo.md").write_text(markdown(results, record))
    print(markdown(results, record))


if __name__ == "__main__":
    main()

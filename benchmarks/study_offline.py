"""The proof on the embedded default: each offline method beside its controls, three seeds of data and training.

    python benchmarks/study_offline.py --arms dpo sft shuffled --output-dir out/study-offline

Each seed draws its own prompts and pictures and trains every arm on the same table; the controls are SFT on the
winners and DPO on preferences shuffled within each row. Each is evaluated on fresh prompts of held-out combinations,
paired with the base by prompt and noise. Stages that are finished are skipped when it is run again, so arms can be
added later.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffalign.quickstart import Settings

log = logging.getLogger("study_offline")


@dataclass(frozen=True)
class Arm:
    """What is trained: a recipe, with overrides where an ablation needs them."""

    title: str
    recipe: str
    overrides: tuple[str, ...] = ()
    shuffled: bool = False


ARMS = {
    "dpo": Arm("Diffusion-DPO", "shapes-dpo"),
    "mapo": Arm("MaPO", "shapes-mapo"),
    "smpo": Arm("SmPO", "shapes-smpo"),
    "rankdpo": Arm("RankDPO", "shapes-rankdpo"),
    "sft": Arm("SFT on the winners (control)", "shapes-sft"),
    "shuffled": Arm("DPO on shuffled preferences (control)", "shapes-dpo", shuffled=True),
    "smpo-hard": Arm("SmPO with hard labels", "shapes-smpo", ("score=null", "gamma=1")),
    "smpo-noise": Arm("SmPO with random noise", "shapes-smpo", ("inversion_steps=0",)),
    "rankdpo-plain": Arm("RankDPO without weights", "shapes-rankdpo", ("weighting=none",)),
}
SCORES = ("shapes-strict", "shapes")


# --- one unit of work, in a process of its own -------------------------------------------------------------------


def work(root: Path, seed: int, arm: str, prompts: int) -> None:
    """The pictures that all arms of a seed share (arm ``data``), or training and evaluation of one arm."""
    from diffalign.quickstart import Settings, make_preferences, train

    settings = Settings(seed=seed, heldout_prompts=prompts)
    folder = root / f"seed-{seed}"
    dataset = make_preferences(folder / "preferences", settings)
    if arm == "data":
        pictures("shapes", settings, folder / "base")
        return
    chosen, run = ARMS[arm], folder / arm
    if chosen.shuffled:
        dataset = dataset.with_shuffled_preferences(seed)
    if not (run / "final" / "model_index.json").is_file():
        settings_of = [*chosen.overrides, "alarms=false", f"cache_dir={folder / 'cache'}"]
        train(folder / "preferences", run, seed, settings_of, dataset=dataset, recipe=chosen.recipe)
    if not (run / "report.json").is_file():
        measure(folder / "base", run, settings)


def captions(settings: Settings) -> list[str]:
    """Evaluation prompts; each names a combination that no training data contains."""
    from diffalign.shapes import sample_captions

    return sample_captions(settings.heldout_prompts, seed=2000 + settings.seed, held_out=True)


def pictures(model: str, settings: Settings, folder: Path) -> list[Path]:
    """One picture per evaluation prompt, drawn or found."""
    from diffalign.evaluation.compare import SamplingSettings, draw
    from diffalign.pipelines import load_pipeline

    texts = captions(settings)
    found = sorted(folder.glob("*.png"))
    if len(found) == len(texts):
        return found
    sampling = SamplingSettings(settings.steps, settings.guidance, settings.batch_size)
    return draw(load_pipeline(model), texts, [0], sampling, folder)


def measure(base: Path, run: Path, settings: Settings) -> None:
    """Compare an arm with the base and write the report."""
    from diffalign.evaluation.compare import SamplingSettings, compare_pictures
    from diffalign.evaluation.report import write_report
    from reward_models import load_reward_model

    comparison = compare_pictures(
        captions(settings),
        [0],
        sorted(base.glob("*.png")),
        pictures(str(run / "final"), settings, run / "pictures"),
        [load_reward_model(name) for name in SCORES],
        sampling=SamplingSettings(settings.steps, settings.guidance, settings.batch_size),
    )
    write_report(comparison, run, method=run.name, base_name="shapes", aligned_name=run.name)


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
    """Results by arm: each seed's own report, all seeds pooled, and the pooled difference from the first arm."""
    from diffalign.evaluation.statistics import compare_paired

    pairs = {arm: [pair for seed in seeds for pair in _pairs(root, seed, arm)] for arm in arms}
    results: dict[str, Any] = {}
    for arm in arms:
        reports = {seed: json.loads((root / f"seed-{seed}" / arm / "report.json").read_text()) for seed in seeds}
        prompts = [key for key, _ in pairs[arm]]
        results[arm] = {"seeds": {str(seed): report["scores"] for seed, report in reports.items()}, "pooled": {}}
        for score in SCORES:
            base = [pair["base"][score] for _, pair in pairs[arm]]
            aligned = [pair["aligned"][score] for _, pair in pairs[arm]]
            first = [pair["aligned"][score] for _, pair in pairs[arms[0]]]
            results[arm]["pooled"][score] = compare_paired(base, aligned, prompts).to_json() | {
                f"{arms[0]}_above_it": compare_paired(aligned, first, prompts).to_json()["difference"]
            }
    return results


def _pairs(root: Path, seed: int, arm: str) -> list[tuple[tuple[int, str], dict[str, Any]]]:
    lines = (root / f"seed-{seed}" / arm / "pairs.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return sorted((((seed, pair["prompt"]), pair) for pair in found), key=lambda item: item[0])


def markdown(results: dict[str, Any], record: dict[str, Any]) -> str:
    """The results as a page."""
    first = next(iter(results))
    seeds = record["seeds"]
    lines = [
        "# Offline methods on the embedded default",
        "",
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['machine']}, torch "
        f"{record['torch']}.",
        "",
        f"Held-out combinations, {record['prompts']} prompts a seed, paired with the base by prompt and noise; 95 % "
        "bootstrap intervals. Each seed has its own prompts, pictures and training. *Strict* is the share of pictures "
        "in which every claim of the caption holds, *soft* the mean share of claims (the score that ranked the "
        "training pictures).",
    ]
    for score, title in zip(SCORES, ("Strict", "Soft"), strict=True):
        lines += [
            "",
            f"| {title} | " + " | ".join(f"seed {s}" for s in seeds) + f" | base | aligned | pooled | {first} above |",
            "|---|" + "---|" * (len(seeds) + 4),
        ]
        for arm, cell in results.items():
            each = [signed(scores[score]["difference"]) for scores in cell["seeds"].values()]
            pooled = cell["pooled"][score]
            above = "-" if arm == first else signed(pooled[f"{first}_above_it"])
            numbers = f"{pooled['base']:.3f} | {pooled['aligned']:.3f} | **{signed(pooled['difference'])}** | {above}"
            lines.append(f"| {ARMS[arm].title} | {' | '.join(each)} | {numbers} |")
    return "\n".join(lines) + "\n"


def signed(difference: dict[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/study-offline"))
    parser.add_argument("--results-dir", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["dpo", "sft", "shuffled"])
    parser.add_argument("--prompts", type=int, default=600, help="evaluation prompts an arm and seed")
    parser.add_argument("--name", default="study-dpo", help="of the two files of results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="units of work at the same time")
    parser.add_argument("--work", nargs=2, metavar=("SEED", "ARM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.work:
        work(args.output_dir, int(args.work[0]), args.work[1], args.prompts)
        return
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
        "command": f"python benchmarks/study_offline.py --arms {' '.join(args.arms)}",
        "seeds": args.seeds,
        "prompts": args.prompts,
    }
    results = collect(args.output_dir, args.seeds, args.arms)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / f"{args.name}.json").write_text(json.dumps(record | {"results": results}, indent=1))
    (args.results_dir / f"{args.name}.md").write_text(markdown(results, record))
    print(markdown(results, record))


if __name__ == "__main__":
    main()

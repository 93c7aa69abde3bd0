"""The proof on the embedded default: each method beside its controls, three seeds of data and training.

    python benchmarks/study_methods.py --arms dpo sft shuffled --output-dir out/study-methods

Each seed draws its own prompts and pictures and trains every offline arm on the same table; the controls are SFT on
the winners and DPO on preferences shuffled within each row. The arms of GRPO draw their own pictures; their control is
a reward at random. Each is evaluated on fresh prompts of held-out combinations, paired with the base by prompt and
noise. Stages that are finished are skipped when it is run again, so arms can be added later.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from record import run_record

if TYPE_CHECKING:
    from PIL import Image

    from diffalign.quickstart import Settings

log = logging.getLogger("study_methods")
IMAGES = 6  # pictures of a prompt, as in the quickstart


@dataclass(frozen=True)
class Arm:
    """What is trained: a recipe, with overrides where an ablation needs them.

    Args:
        title: in the table of results.
        recipe: name of the recipe.
        overrides: settings in place of the recipe's.
        data: ``ranked`` pictures of the seed's table, the same with ``shuffled`` preferences, or ``prompts`` alone.
        images: pictures of each prompt in the table; those of a smaller table are the first of a larger one.
        beside: for an ablation, the arm that differs from it in one thing.
    """

    title: str
    recipe: str
    overrides: tuple[str, ...] = ()
    data: str = "ranked"
    images: int = IMAGES
    beside: str | None = None


ARMS = {
    "dpo": Arm("Diffusion-DPO", "shapes-dpo"),
    "mapo": Arm("MaPO", "shapes-mapo"),
    "smpo": Arm("SmPO", "shapes-smpo", beside="dpo"),
    "rankdpo": Arm("RankDPO", "shapes-rankdpo", beside="dpo"),
    "sft": Arm("SFT on the winners (control)", "shapes-sft"),
    "shuffled": Arm("DPO on shuffled preferences (control)", "shapes-dpo", data="shuffled"),
    # Ablations. SmPO with hard labels and random noise is DPO, bit for bit, so that it stands beside DPO.
    # With eight draws a row, as for random noise, its inversions alone would take twenty minutes of a core.
    "smpo-inverted": Arm(
        "SmPO, inverted noise", "shapes-smpo", ("inversion_steps=5", "precompute_reference=3"), beside="smpo"
    ),
    "smpo-inverted-hard": Arm(
        "SmPO, inverted noise, hard labels",
        "shapes-smpo",
        ("inversion_steps=5", "precompute_reference=3", "score=null", "gamma=1"),
        beside="smpo-inverted",
    ),
    "rankdpo-plain": Arm("RankDPO without weights", "shapes-rankdpo", ("weighting=none",), beside="rankdpo"),
    # Lists of four and of eight; a step sees 32 images, as 16 pairs do.
    "dpo-4": Arm("DPO, all pairs of 4", "shapes-dpo", images=4),
    "rankdpo-4": Arm("RankDPO, lists of 4", "shapes-rankdpo", ("batch_size=8",), images=4, beside="dpo-4"),
    "dpo-8": Arm("DPO, all pairs of 8", "shapes-dpo", images=8),
    "rankdpo-8": Arm("RankDPO, lists of 8", "shapes-rankdpo", ("batch_size=4",), images=8, beside="dpo-8"),
    "prefgrpo": Arm("Pref-GRPO, the checker as judge", "shapes-prefgrpo", data="prompts"),
    "grpo": Arm("GRPO on the checker's scores", "shapes-prefgrpo", ("reward=score",), data="prompts"),
    "prefgrpo-judge": Arm(
        "Pref-GRPO, the learned judge", "shapes-prefgrpo", ("rewards=[shapes-judge]",), data="prompts"
    ),
    "grpo-random": Arm(
        "Pref-GRPO, judged at random (control)",
        "shapes-prefgrpo",
        ("rewards=[study_methods:judged_at_random]",),
        data="prompts",
    ),
}
CONTROLS = ("sft", "shuffled", "grpo-random")
SCORES = {  # and their titles in the tables
    "shapes-strict": "Strict",
    "shapes-reader": "Independent reader",
    "shapes": "Training score",
    "shapes-judge": "Learned judge",
}


# --- one unit of work, in a process of its own -------------------------------------------------------------------


def work(root: Path, seed: int, arm: str, prompts: int) -> None:
    """Training and evaluation of one arm, or what arms of a seed share: the base's pictures (arm ``base``), or a table
    of K pictures a prompt (arm ``data-K``)."""
    from diffalign.data import load_preferences
    from diffalign.quickstart import Settings, make_preferences, train

    folder = root / f"seed-{seed}"
    stage, _, images = arm.partition("-")
    if stage == "data":
        make_preferences(folder / table_name(int(images)), Settings(seed=seed, images_per_prompt=int(images)))
        return
    settings = Settings(seed=seed, heldout_prompts=prompts)
    if arm == "base":
        pictures("shapes", settings, folder / "base")
        return
    chosen, run = ARMS[arm], folder / arm
    table = folder / table_name(chosen.images)
    if not (run / "final" / "model_index.json").is_file():
        settings_of = [*chosen.overrides, "alarms=false", "progress_bar=false", f"cache_dir={folder / 'cache'}"]
        if chosen.data == "prompts":
            train("shapes:train", run, seed, settings_of, dataset="shapes:train", recipe=chosen.recipe)
        else:
            dataset = load_preferences(table)
            if chosen.data == "shuffled":
                dataset = dataset.with_shuffled_preferences(seed)
            train(table, run, seed, settings_of, dataset=dataset, recipe=chosen.recipe)
    if not measured(run):
        measure(folder / "base", run, settings)


def table_name(images: int) -> str:
    """Folder of a seed's table."""
    return "preferences" if images == IMAGES else f"preferences-{images}"


def shared_stages(arms: Sequence[str]) -> list[str]:
    """What must be there before any of the arms can run."""
    images = sorted({ARMS[arm].images for arm in arms if ARMS[arm].data != "prompts"})
    return ["base", *(f"data-{count}" for count in images)]


def measured(run: Path) -> bool:
    """Whether a run's report is there and holds every score."""
    file = run / "report.json"
    return file.is_file() and set(SCORES) <= set(json.loads(file.read_text())["scores"])


def judged_at_random(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """A reward that knows nothing, and says the same of the same picture each time."""
    return [zlib.crc32(image.tobytes()) / 2**32 for image in images]


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
    """Results by arm: each seed's own report, all seeds pooled, and the pooled difference from each control and, for an
    ablation, from the arm that it stands beside.

    Prompts are what is resampled: an interval says how sure the difference of these trained models is, not how much
    another training seed would change it. That is what the columns of single seeds are for.
    """
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
            pooled = compare_paired(base, aligned, prompts).to_json()
            for other in (name for name in arms if name in (*CONTROLS, ARMS[arm].beside) and name != arm):
                if [key for key, _ in pairs[other]] != prompts:
                    raise SystemExit(f"{arm} and {other} were evaluated on different prompts: run both again.")
                its = [pair["aligned"][score] for _, pair in pairs[other]]
                pooled[f"above_{other}"] = compare_paired(its, aligned, prompts).to_json()["difference"]
            results[arm]["pooled"][score] = pooled
    return results


def _pairs(root: Path, seed: int, arm: str) -> list[tuple[tuple[int, str], dict[str, Any]]]:
    lines = (root / f"seed-{seed}" / arm / "pairs.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return sorted((((seed, pair["prompt"]), pair) for pair in found), key=lambda item: item[0])


def markdown(results: dict[str, Any], record: dict[str, Any]) -> str:
    """The results as a page."""
    controls = [arm for arm in results if arm in CONTROLS]
    heads = ["base", "aligned", "all seeds", *(f"above {ARMS[arm].title}" for arm in controls)]
    ablations = any(ARMS[arm].beside in results for arm in results)
    heads += ["above"] * ablations
    seeds = record["seeds"]
    lines = [
        "# Methods on the embedded default",
        "",
        f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['machine']}, torch "
        f"{record['torch']}.",
        "",
        f"Held-out combinations, {record['prompts']} prompts a seed, paired with the base by prompt and noise; 95 % "
        "bootstrap intervals over prompts. Each seed has its own prompts, pictures and training; how much training "
        "itself varies is seen between the seeds. *Strict* is the share of pictures "
        "in which every claim of the caption holds, by the checker; *independent reader* is the same share as read by "
        "`shapes-reader`, a network that has learned from drawn pictures alone and ranked nothing; *training score* is "
        "what ranked the training pictures: the share of claims that hold, and 0.3 more where all do; *learned judge* "
        "is `shapes-judge`, which learned from the checker's preferences and is right on two pairs in three.",
    ]
    for score, title in SCORES.items():
        lines += [
            "",
            f"| {title} | " + " | ".join([*(f"seed {seed}" for seed in seeds), *heads]) + " |",
            "|---|" + "---|" * (len(seeds) + len(heads)),
        ]
        for arm, cell in results.items():
            each = [signed(scores[score]["difference"]) for scores in cell["seeds"].values()]
            pooled = cell["pooled"][score]
            numbers = [f"{pooled['base']:.3f}", f"{pooled['aligned']:.3f}", f"**{signed(pooled['difference'])}**"]
            above = [signed(pooled[f"above_{name}"]) if name != arm else "" for name in controls]
            if ablations:
                beside = ARMS[arm].beside
                above += [f"{ARMS[beside].title}: {signed(pooled[f'above_{beside}'])}" if beside in results else ""]
            lines.append(f"| {ARMS[arm].title} | {' | '.join([*each, *numbers, *above])} |")
    return "\n".join(lines) + "\n"


def signed(difference: dict[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/study-methods"))
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
        shared = {
            seed: [
                pool.submit(launch, args.output_dir, seed, s, args.prompts, threads) for s in shared_stages(args.arms)
            ]
            for seed in args.seeds
        }
        units = []
        for seed in args.seeds:
            for stage in shared[seed]:
                stage.result()
            units += [pool.submit(launch, args.output_dir, seed, arm, args.prompts, threads) for arm in args.arms]
        for unit in units:
            unit.result()
    record = run_record() | {"seeds": args.seeds, "prompts": args.prompts}
    results = collect(args.output_dir, args.seeds, args.arms)
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / f"{args.name}.json").write_text(json.dumps(record | {"results": results}, indent=1))
    (args.results_dir / f"{args.name}.md").write_text(markdown(results, record))
    print(markdown(results, record))


if __name__ == "__main__":
    main()

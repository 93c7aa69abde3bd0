"""The generator at work: 1,000 prompts x 4 pictures from two checkpoints x three scorers, then DPO and RankDPO on them.

    python benchmarks/study_generate.py                     # under an hour on 2 quiet cores
    python benchmarks/study_generate.py --prompts 40 --steps 20 --heldout-prompts 40 --results-dir out/try     # a try

The second checkpoint is the base after the quickstart's own DPO, so this is also a second round. All three scorers
vote; the learned judge, which errs on a pair in three, counts a quarter, and pairs and lists that it alone decides are
left out (``min_margin``). Every trained model is compared with the base on the quickstart's held-out prompts, and with
what the quickstart's small set gave, pair by pair. Stopped, it continues; finished stages are not repeated, and keep
their times. Results: ``RESULTS_DIR/study-generate.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generate_cost import SYNPIC_PROMPTS, markdown, project, rates, read_shards
from record import ROOT, run_record

SCORES = ("shapes-strict", "shapes")
BASE = {"name": "base", "model": "shapes", "images": 2, "steps": 12, "guidance": 3.0, "batch_size": 32}
SCORERS = ["shapes", "shapes-strict", {"model": "shapes-judge", "weight": 0.25}]


@dataclass(frozen=True)
class Arm:
    """A training.

    Args:
        title: in the table.
        recipe: its recipe.
        table: folder of what it trains on.
        overrides: settings in place of the recipe's.
        small: the arm on the quickstart's set that it is held against.
    """

    title: str
    recipe: str
    table: str
    overrides: tuple[str, ...] = ()
    small: str | None = None


# The judge alone moves a preference by 0.25 / 2.25 = 0.11 at most. A right picture leads a wrong one by
# 2 / 2.25 / 3 = 0.30 or more, by 0.19 where the judge would have it the other way round.
# Lists of 4 instead of 6: 8 of them are 32 pictures a step, as 5 of 6 are 30. The recipes' 500 steps visit each list of
# the small set eight times; of this table that takes 1000, which one arm gives the small set too.
LONG = ("max_steps=1000",)
TABLE = ("min_margin=0.12", *LONG)
ARMS = {
    "quickstart": Arm("DPO, the quickstart's set", "shapes-dpo", "quickstart/preferences"),
    "rankdpo-small": Arm("RankDPO, the quickstart's set", "shapes-rankdpo", "quickstart/preferences"),
    "rankdpo": Arm("RankDPO, this table", "shapes-rankdpo", "table", (*TABLE, "batch_size=8"), "rankdpo-small"),
    "dpo": Arm("DPO, this table", "shapes-dpo", "table", TABLE, "quickstart"),
    "rankdpo-small-long": Arm(
        "RankDPO, the quickstart's set, twice the steps",
        "shapes-rankdpo",
        "quickstart/preferences",
        LONG,
        "rankdpo-small",
    ),
}


# --- the stages ----------------------------------------------------------------------------------------------------


class Stages:
    """Seconds of each stage, kept in a file, so that a stage that is finished keeps its time.

    Args:
        file: where they are kept.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time a stage; of one that a kill interrupted, the time before the kill is lost, and ``starts`` says so."""
        own = self.known.setdefault(name, {"seconds": 0.0, "starts": 0, "done": False})
        if own["done"]:
            yield
            return
        own["starts"] += 1
        self._keep()
        began = time.perf_counter()
        try:
            yield
            own["done"] = True
        finally:
            own["seconds"] += time.perf_counter() - began
            self._keep()

    def _keep(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.known, indent=1) + "\n")


def run(arguments: argparse.Namespace, stages: Stages) -> dict[str, Any]:
    """All stages, or those that are not finished; returns what they found."""
    from diffalign import quickstart
    from diffalign.data import load_preferences
    from diffalign.synthesis.config import GenerationConfig
    from diffalign.synthesis.policy import with_policy
    from diffalign.synthesis.run import generate

    folder: Path = arguments.output_dir
    short = [] if arguments.steps is None else [f"max_steps={arguments.steps}", "warmup_steps=0"]
    sizes = {"heldout_prompts": arguments.heldout_prompts, "prompts": min(arguments.prompts, 320)}
    with stages.timed("quickstart: make its set, train, evaluate"):
        quickstart.run(folder / "quickstart", seed=arguments.seed, overrides=short, **sizes)
    config = GenerationConfig(
        output_dir=str(folder / "table"), prompts="shapes", max_prompts=arguments.prompts, seed=arguments.seed,
        pipelines=[BASE], reward_models=SCORERS,
    )  # fmt: skip
    with stages.timed("generate: draw, score, rank, write"):
        made = generate(with_policy(config, folder / "quickstart" / "run"))
    with stages.timed("load in `datasets`, every picture decoded"):
        loaded = load(folder / "table")
    settings = quickstart.Settings(seed=arguments.seed, heldout_prompts=arguments.heldout_prompts)
    for name, arm in list(ARMS.items())[1:]:
        table, out = folder / arm.table, folder / name
        with stages.timed(f"train {arm.title}"):
            if not (out / "final").is_dir():
                overrides = [*arm.overrides, *short, "progress_bar=false"]
                data = load_preferences(table)
                quickstart.train(table, out, arguments.seed, overrides, dataset=data, recipe=arm.recipe)
        with stages.timed(f"evaluate {arm.title}"):
            quickstart.measure(out, out / "evaluation", settings)
    return {"generation": made, "loaded": loaded, "arms": compare(folder)}


def load(table: Path) -> dict[str, Any]:
    """Read the table as anybody would, with `datasets` alone."""
    import datasets

    rows = datasets.load_dataset(str(table), split="train")
    images = [image.size for row in rows for image in row["images"]]
    return {
        "rows": len(rows),
        "images": len(images),
        "sizes": sorted(set(images)),
        "scores": [entry["name"] for entry in rows[0]["scores"]],
        "columns": rows.column_names,
    }


# --- what came out -------------------------------------------------------------------------------------------------


def compare(folder: Path) -> dict[str, Any]:
    """Each arm against the base, and against its arm on the quickstart's set, paired by prompt and noise."""
    from diffalign.evaluation.statistics import compare_paired

    places = {name: folder / name / "evaluation" for name in ARMS} | {"quickstart": folder / "quickstart"}
    pairs = {name: read_pairs(places[name]) for name in ARMS}
    results: dict[str, Any] = {}
    for name, arm in ARMS.items():
        results[name] = {}
        for score in SCORES:
            prompts = list(pairs[name])
            base, aligned = ([pairs[name][p][side][score] for p in prompts] for side in ("base", "aligned"))
            results[name][score] = compare_paired(base, aligned, prompts).to_json()
            if arm.small is not None:
                small = [pairs[arm.small][p]["aligned"][score] for p in prompts]
                results[name][score]["above_small"] = compare_paired(small, aligned, prompts).to_json()["difference"]
    return results


def read_pairs(folder: Path) -> dict[str, dict[str, Any]]:
    """The pairs of an evaluation, by prompt."""
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return {pair["prompt"]: pair for pair in map(json.loads, lines)}


def page(results: dict[str, Any]) -> str:
    """The results as a page."""
    record, made, loaded = results["record"], results["generation"], results["loaded"]
    return "\n".join(
        [
            "# The generator on the embedded default",
            "",
            f"`{record['command']}`, {record['date']}, commit {record['commit']}, {record['machine']}, "
            f"{record['threads']} threads, torch {record['torch']}.",
            "",
            f"{made['rows']} rows with {made['images']} ranked pictures of {made['drawn']} drawn, by two checkpoints "
            "(the base, and the base after the quickstart's DPO), judged by three scorers. `datasets.load_dataset` "
            f"reads {loaded['rows']} rows and {loaded['images']} pictures. {made['ties_for_first']} rows tie for "
            f"first, {made['all_tied']} wholly.",
            "",
            *stage_lines(results["stages"]),
            "",
            "## The pictures",
            "",
            *picture_lines(made),
            "",
            "## What training on them gives",
            "",
            f"{results['heldout_prompts']} held-out prompts, paired by prompt and noise; 95 % bootstrap intervals over "
            "prompts; one seed. *Above the small set*: against the same method on the quickstart's own pictures.",
            "",
            *arm_lines(results["arms"]),
            "",
            "## What a large run of these models would cost",
            "",
            results["rates"],
            "",
            results["cost"],
            "",
        ]
    )


def stage_lines(stages: dict[str, dict[str, Any]]) -> list[str]:
    """Seconds of each stage as a table."""
    lines = ["| stage | seconds |", "|---|---|"]
    for name, own in stages.items():
        note = f" ({own['starts']} starts; what a kill threw away is not counted)" if own["starts"] > 1 else ""
        lines.append(f"| {name} | {own['seconds']:.0f}{note} |")
    return [*lines, f"| all | {sum(own['seconds'] for own in stages.values()):.0f} |"]


def picture_lines(made: dict[str, Any]) -> list[str]:
    """Both pipelines side by side, and how the scorers agree."""
    lines = ["| pipeline | mean preference | first | diversity | mean scores |", "|---|---|---|---|---|"]
    for name, own in made["by_pipeline"].items():
        scores = ", ".join(f"{score} {value:.3f}" for score, value in own["mean_scores"].items())
        numbers = (own["mean_preference"], own["share_first"], own["diversity"])
        cells = ["-" if value is None else f"{value:.3f}" for value in numbers]
        lines.append(f"| {name} | {' | '.join(cells)} | {scores} |")
    shares = {f"{name} alike": value for name, value in made["agreement"].items()}
    shares |= {f"{name} against the ranking": value for name, value in made["contradiction"].items()}
    told = "; ".join(f"{name} {value:.3f}" for name, value in shares.items() if value is not None)
    return [*lines, "", f"Of the pairs that both decide: {told}."]


def arm_lines(arms: dict[str, Any]) -> list[str]:
    """Differences from the base, and from the small set."""
    heads = [head for score in SCORES for head in (score, f"{score}, above the small set")]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, scores in arms.items():
        cells = []
        for score in SCORES:
            above = scores[score].get("above_small")
            cells += [f"**{signed(scores[score]['difference'])}**", signed(above) if above else ""]
        arm = ARMS[name]
        settings = f" (`{' '.join(arm.overrides)}`)" if arm.overrides else ""
        lines.append(f"| {arm.title}{settings} | {' | '.join(cells)} |")
    return lines


def signed(difference: dict[str, Any]) -> str:
    """A difference with its interval; there is none of a few prompts."""
    low, high = difference["ci95"]
    return f"{difference['mean']:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/study-generate"))
    parser.add_argument("--results-dir", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--heldout-prompts", type=int, default=600)
    parser.add_argument("--steps", type=int, default=None, help="training steps in place of the recipes' own")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages = Stages(arguments.output_dir / "stages.json")
    results = {"record": run_record(), "heldout_prompts": arguments.heldout_prompts, **run(arguments, stages)}
    shards = read_shards(arguments.output_dir / "table")
    costs = project(shards, SYNPIC_PROMPTS, [1, 8, 64], load_seconds=5.0)
    results |= {"stages": stages.known, "rates": rates(shards), "cost": markdown(costs, SYNPIC_PROMPTS, 5.0)}
    arguments.results_dir.mkdir(parents=True, exist_ok=True)
    (arguments.results_dir / "study-generate.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.results_dir / "study-generate.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()

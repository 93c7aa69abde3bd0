"""Curves of a study's runs as a picture for a method's page: three panels, one line a seed.

python benchmarks/study_curves.py out/study-methods dpo docs/images/curves-dpo.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]
OFFLINE = ("rewards/accuracies", "error/winner_change", "error/loser_change")
WITHOUT_REFERENCE = ("rewards/accuracies", "error/winner", "error/loser")
ONLINE = ("reward/{}/score", "group/diversity", "holdout/shapes-strict")
COLOURS = ("#2563eb", "#d97706", "#059669", "#c026d3")


def read_curve(run: Path, name: str) -> Curve:
    """Steps and values of a metric, where it was written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def panels(run: Path) -> Sequence[str]:
    """The metrics that tell how a run of its kind goes."""
    names = set().union(*(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()))
    judged = sorted(name.split("/")[1] for name in names if name.startswith("reward/") and name.endswith("/score"))
    if judged:
        return [name.format(judged[0]) for name in ONLINE]
    return OFFLINE if OFFLINE[1] in names else WITHOUT_REFERENCE


def smoothed(curve: Curve, width: int) -> Curve:
    """Means of ``width`` neighbours: single batches are noise."""
    steps, values = curve
    if len(values) < 3 * width:
        return curve
    starts = range(0, len(values) - width + 1)
    return [steps[i + width // 2] for i in starts], [sum(values[i : i + width]) / width for i in starts]


def panel(axes: Axes, name: str, curves: dict[str, Curve]) -> None:
    for (seed, (steps, values)), colour in zip(curves.items(), COLOURS, strict=False):
        axes.plot(steps, values, color=colour, linewidth=1.5, label=seed, marker="o" if len(steps) < 8 else None)
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("arm")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smooth", type=int, default=5, help="neighbouring values that are averaged")
    args = parser.parse_args()
    runs = {f"seed {seed}": args.study / f"seed-{seed}" / args.arm for seed in args.seeds}
    names = panels(next(iter(runs.values())))
    figure = Figure(figsize=(10.5, 2.7), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        panel(axes, name, {seed: smoothed(read_curve(run, name), args.smooth) for seed, run in runs.items()})
    figure.axes[0].legend(fontsize=8, frameon=False)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=110, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()

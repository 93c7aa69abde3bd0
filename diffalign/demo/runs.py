"""Training runs as they lie on the disk: curves, validation pictures, settings, checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from ..trainers.checkpoints import list_checkpoints
from .models import ModelSpec, base_of, parse_model

START = "start"  # the model that a run began with
METRICS, DEPTH = "metrics.jsonl", 4  # folders below the root in which runs are looked for
MAX_RUNS = 200
MAX_POINTS = 400  # of a curve; longer ones are thinned by means of neighbours

#: Curves of the health panel: title, what to read from it, and the metrics drawn in it (patterns of their names).
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Loss", "falls slowly; a flat one can still win", ("loss",)),
    ("Accuracy", "share of rows where the winner gained more; above 0.5 is learning", ("rewards/accuracies",)),
    ("Margin", "how much more the winner gained than the loser", ("rewards/margins",)),
    ("Error against the start", "the winner's must not rise", ("error/winner_change", "error/loser_change")),
    ("Held-out prompts", "change against the base; the training score alone rising is hacking", ("holdout/*_change",)),
    ("Diversity", "distance between pictures of a group; a fall is a collapse", ("group/diversity",)),
    ("Judge", "shares of pairs with no winner, or no answer", ("reward/*/ties", "reward/*/missing")),
    ("Clipped steps", "share of terms without gradient; 0 with one update a rollout, near 1 is wrong", ("clip_share",)),
    ("Distance from the start", "slow growth is learning, a jump is breaking", ("kl",)),
    ("Gradient", "spikes mean that the learning rate is too high", ("grad_norm",)),
)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern, in the order of the patterns."""
    known = list(names)
    return [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]


@dataclass(frozen=True)
class Run:
    """One training run.

    Args:
        name: its folder, relative to the root.
        folder: where it is.
    """

    name: str
    folder: Path

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """(steps, values) by metric; NaN where the run logged none. An unfinished last line is left out."""
        rows = []
        for line in (self.folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the trainer is writing it just now
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        steps = [row["step"] for row in rows]
        return {name: _thinned(steps, [_number(row.get(name)) for row in rows]) for name in names}

    def verdict(self) -> str:
        """What the run's own alarms said, in a sentence."""
        report = _json(self.folder / "training_report.json")
        if report is None:
            return "The run has no final report: it is still going, or was stopped."
        alarms = report.get("alarms") or []
        done = f"Finished after {report.get('steps', '?')} steps"
        if not alarms:
            return f"{done}; no alarm was raised."
        first = alarms[0]
        count = "1 alarm" if len(alarms) == 1 else f"{len(alarms)} alarms; the first"
        return f"{done} with {count} at step {first['step']}: {first['message']}"

    def settings(self) -> str:
        """The resolved settings as YAML."""
        file = self.folder / "config.yaml"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        for _, folder in reversed(list_checkpoints(self.folder)):
            if (config := _json(folder / "training_config.json")) is not None:
                return yaml.safe_dump(config, sort_keys=False)
        return "# The run left no settings behind."

    def grids(self) -> dict[int, Path]:
        """Validation pictures by step, base on the left and the trained model on the right of each pair."""
        files = sorted((self.folder / "validation").glob("step-*.png"))
        return {int(file.stem.removeprefix("step-")): file for file in files if file.stem[5:].isdigit()}

    def checkpoints(self) -> dict[str, Path]:
        """Weights to compare by name, in the order of training."""
        found = {f"step {step}": folder for step, folder in list_checkpoints(self.folder)}
        return found | ({"final": self.folder / "final"} if (self.folder / "final").is_dir() else {})

    def specs(self, points: Sequence[str], base: str) -> dict[str, ModelSpec]:
        """Checkpoints, or ``START``, as models of the demo that are called like them.

        Args:
            points: names.
            base: what the run started from, where it does not say so itself.

        Raises:
            ConfigError: the run has no such checkpoint.
        """
        known: dict[str, Any] = {START: base_of(self.folder) or base, **self.checkpoints()}
        for point in points:
            if point not in known:
                raise ConfigError(f"{self.name} has no checkpoint {point!r}, but {', '.join(known)}.")
        return {point: replace(parse_model(str(known[point]), base), label=point) for point in points}


class Runs:
    """The runs below a folder. Nothing outside it can be named."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()

    def names(self) -> list[str]:
        """Runs by name, the newest first."""
        found: list[Path] = []
        for depth in range(DEPTH):
            found += self.root.glob("/".join(["*"] * depth + [METRICS]))
        newest = sorted(found, key=lambda file: -file.stat().st_mtime)[:MAX_RUNS]
        return [str(file.parent.relative_to(self.root)) for file in newest]

    def __getitem__(self, name: str) -> Run:
        if name not in self.names():
            raise ConfigError(f"There is no training run called {name!r} in {self.root.name}.")
        return Run(name, self.root / name)


def _thinned(steps: list[int], values: list[float]) -> tuple[list[int], list[float]]:
    """At most ``MAX_POINTS`` points, each the mean of as many neighbours that have a value."""
    stride = -(-len(steps) // MAX_POINTS)
    if stride <= 1:
        return steps, values
    means = []
    for start in range(0, len(steps), stride):
        present = [value for value in values[start : start + stride] if not math.isnan(value)]
        means.append(sum(present) / len(present) if present else math.nan)
    return steps[::stride], means


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None

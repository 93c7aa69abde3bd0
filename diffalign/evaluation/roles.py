"""What a model was trained on, so that a report can say which scores are held out.

A score that made the preferences says how well training went, not whether pictures became better: a model can learn the
scorer's mistakes. Only a hold-out score speaks about the pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from ..data.judgement import read_scores
from ..data.sources import GENERATION_REPORT, SCORE_RANGES, open_table
from ..errors import DataError

TRAINED_ON, RELATED, HOLD_OUT, UNKNOWN = "trained-on", "related", "hold-out", "unknown"
MEANING = {
    TRAINED_ON: "made the preferences",
    RELATED: "shares its parts with a score that made the preferences",
    HOLD_OUT: "not used in training",
    UNKNOWN: "training is not recorded",
}

VOTE_SCORE = "vote"  # in tables of people's votes; the other scores there are notes, and decided nothing

#: Scores that are one judge in several forms, and what a setting calls it.
FAMILIES = (
    {"shapes", "shapes-strict"},
    {"clip", "clip-cosine"},
    {"aesthetic", "aesthetic-v1"},
    {"hpsv2", "hpsv2.0", "hpsv2.1"},
)


@dataclass(frozen=True)
class Training:
    """What is recorded about a training run; None or empty where nothing is.

    Args:
        method: for example ``dpo``.
        seed: run seed.
        commit: of the code that trained it.
        trained_on: names of the scores that made its preferences; None when not recorded.
    """

    method: str | None = None
    seed: int | None = None
    commit: str | None = None
    trained_on: tuple[str, ...] | None = None


def read_training(path: str | Path) -> Training:
    """Read the run that made the weights at ``path``: the folder of a run, its ``final``, or a file in that."""
    place = Path(path)
    for folder in (place, place.parent, place.parent.parent) if place.exists() else ():
        report, config = _json(folder / "training_report.json"), read_yaml(folder / "config.yaml")
        if not report and "method" not in config:
            continue
        settings = _json(folder / "training_config.json")
        method, commit = report.get("method", config.get("method")), report.get("commit")
        seed = config.get("seed", settings.get("seed"))
        return Training(
            method if isinstance(method, str) else None,
            seed if isinstance(seed, int) else None,
            commit if isinstance(commit, str) else None,
            _trained_on(report, config),
        )
    return Training()


def role(score: str, trained_on: Sequence[str] | None) -> str:
    """One of the four roles of a score for a model."""
    if trained_on is None:
        return UNKNOWN
    if score in trained_on:
        return TRAINED_ON
    if any(score in family and family.intersection(trained_on) for family in FAMILIES):
        return RELATED
    return HOLD_OUT


def _trained_on(report: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The judges that an online run says it had, else scores named by its config, else those in its table."""
    if _are_names(report.get("rewards")):
        return tuple(report["rewards"])
    if isinstance(config.get("dataset_score"), str):
        return (config["dataset_score"],)
    if _are_names(named := config.get("rewards")):  # a run that has not ended
        names = tuple(name.partition("?")[0] for name in named)
        return None if any(":" in name for name in names) else names  # what a class calls its scores, it alone knows
    dataset = config.get("dataset")
    return _scores_of(Path(dataset)) if isinstance(dataset, str) else None


def _are_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _scores_of(folder: Path) -> tuple[str, ...] | None:
    """Scores that decided a table's preferences; none where the order of its pipelines did."""
    if not folder.is_dir():  # on the hub, or moved: asking the network for a role is not worth it
        return None
    made = _json(folder / GENERATION_REPORT)
    if made.get("rank_by") == "pipelines":
        return ()
    names = tuple(name for name in _json(folder / SCORE_RANGES) if name not in made.get("hold_outs", []))
    if names:
        return _deciding(names)
    try:
        cells = next(iter(open_table(folder, split="train", revision=None).outlines()))
        images = cells.get("images")
        count = images if isinstance(images, int) else len(images or [])
        return _deciding(tuple(read_scores(cells.get("scores"), count, "row 0"))) or None
    except (DataError, StopIteration):
        return None


def _deciding(names: tuple[str, ...]) -> tuple[str, ...]:
    return (VOTE_SCORE,) if VOTE_SCORE in names else names


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file; empty where there is none, or the file holds something else."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}

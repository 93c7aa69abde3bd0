"""An evaluation on disk: ``report.json``, ``report.html``, ``grid.png`` and the scores of every pair."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..data.files import atomic_file
from ..environment import code_commit, installed
from ..errors import ConfigError
from .compare import Comparison
from .grid import picture_grid
from .models import ModelSpec
from .roles import Training, role
from .selection import random_pairs
from .statistics import holm, interval_json, json_number

_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft")
GRID_PAIRS = 16


@dataclass
class ModelResult:
    """One aligned model, compared with the base at one or more guidance scales.

    Args:
        spec: which model.
        sweep: comparisons; the first is the one that headlines and pictures are about.
        training: what is recorded about its training.
        trained_on: scores that made its preferences; None when not known.
        identity: hash of its weights and the base's; None when not known.
        holm: adjusted p-value of each score, over all models and scores of the evaluation.
    """

    spec: ModelSpec
    sweep: list[Comparison]
    training: Training = field(default_factory=Training)
    trained_on: Sequence[str] | None = None
    identity: str | None = None
    holm: dict[str, float] = field(default_factory=dict)

    @property
    def comparison(self) -> Comparison:
        return self.sweep[0]

    def role(self, score: str) -> str:
        return role(score, self.trained_on)


def write_report(
    comparison: Comparison,
    folder: str | Path,
    *,
    method: str,
    base_name: str,
    aligned_name: str,
    primary: str | None = None,
) -> dict[str, Any]:
    """:func:`write_evaluation` of a single comparison."""
    result = ModelResult(ModelSpec(aligned_name, comparison.name), [comparison], Training(method=method))
    return write_evaluation([result], folder, base_name=base_name, primary=primary)


def write_evaluation(
    results: Sequence[ModelResult],
    folder: str | Path,
    *,
    base_name: str,
    primary: str | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the four files; each appears whole or not at all.

    Args:
        results: one for each aligned model, all on the same prompts, seeds and scores.
        folder: made when missing.
        base_name: how the base is called in the report.
        primary: the score that picks and marks pictures; the first when None.
        extra: further keys of ``report.json``.

    Returns:
        The content of ``report.json``.

    Raises:
        ConfigError: ``primary`` is not among the scores.
        DataError: the folder cannot be written.
    """
    from .html import render_html

    first = results[0].comparison
    primary = primary or next(iter(first.results))
    if primary not in first.results:
        raise ConfigError(f"primary must be one of the scores {', '.join(first.results)}, got {primary!r}.")
    folder = Path(folder)
    _adjust(results)
    report = report_dict(results, base_name=base_name) | (extra or {})
    grid = picture_grid(first, random_pairs(first, GRID_PAIRS), primary)
    html = render_html(results, report, primary)
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pair_records(results))
    picture = io.BytesIO()
    grid.save(picture, format="PNG")
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = {"pairs.jsonl": lines.encode(), "grid.png": picture.getvalue(), "report.html": html.encode()}
    for name, content in (files | {"report.json": text.encode()}).items():  # last: where it is, the work is done
        with atomic_file(folder / name) as file:
            file.write(content)
    return report


def report_dict(results: Sequence[ModelResult], *, base_name: str) -> dict[str, Any]:
    """The content of ``report.json``: plain keys, null where a number is missing.

    ``method``, ``aligned`` and ``scores`` are those of the first model; ``models`` holds all of them.
    """
    models = [_model(result) for result in results]
    comparison = results[0].comparison
    return {
        "method": models[0]["method"],
        "base": base_name,
        "aligned": models[0]["model"],
        "prompts": len(comparison.prompts),
        "seeds": len(comparison.seeds),
        "pairs": len(comparison.pairs),
        "scores": models[0]["scores"],
        "models": models,
        "seconds": {stage: round(value, 2) for stage, value in comparison.seconds.items()},
        "sampling": asdict(comparison.sampling),
        "prompts_hash": hashlib.blake2b("\0".join(comparison.prompts).encode(), digest_size=8).hexdigest(),
        "reward_models": comparison.scorers,
        "versions": {name: installed(name) for name in _PACKAGES},
        "commit": code_commit(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def pair_records(results: Sequence[ModelResult]) -> list[dict[str, Any]]:
    """One record per (prompt, seed) with the raw scores of all pictures: all that other statistics need.

    The base's score under a pairwise judge is that against the first model.
    """

    def at(scores: dict[str, list[float]], index: int) -> dict[str, float | None]:
        return {name: json_number(values[index]) for name, values in scores.items()}

    first = results[0].comparison
    records: list[dict[str, Any]] = []
    for i, (prompt, seed) in enumerate(first.pairs):
        record = {"prompt": prompt, "seed": seed, "base": at(first.base_scores, i)}
        for result in results:
            record[result.spec.name] = at(result.comparison.aligned_scores, i)
        records.append(record)
    return records


def _adjust(results: Sequence[ModelResult]) -> None:
    """Holm's adjustment over every (model, score) of the evaluation."""
    keys = [(result, name) for result in results for name in result.comparison.results]
    signs = [result.comparison.signs.get(name) for result, name in keys]
    for (result, name), p in zip(keys, holm([math.nan if sign is None else sign.p for sign in signs]), strict=True):
        result.holm[name] = p


def _model(result: ModelResult) -> dict[str, Any]:
    spec, training, comparison = result.spec, result.training, result.comparison
    return {
        "name": spec.name,
        "model": str(spec),
        "method": training.method or spec.name,
        "training_seed": training.seed,
        "training_commit": training.commit,
        "trained_on": None if result.trained_on is None else list(result.trained_on),
        "identity": result.identity,
        "scores": {name: _score(result, name) for name in comparison.results},
        "appearance": {name: _plain(paired.to_json()) for name, paired in comparison.appearance.items()},
        "moved": json_number(sum(comparison.moved) / len(comparison.moved)) if comparison.moved else None,
        "guidance": [
            {"guidance": c.sampling.guidance, "scores": {n: r.to_json() for n, r in c.results.items()}}
            for c in result.sweep
        ],
    }  # fmt: skip


def _score(result: ModelResult, name: str) -> dict[str, Any]:
    comparison = result.comparison
    entry = comparison.results[name].to_json() | {"role": result.role(name)}
    if name in comparison.signs:
        sign = asdict(comparison.signs[name])
        entry["sign_test"] = sign | {"p": json_number(sign["p"]), "p_holm": json_number(result.holm[name])}
    if name in comparison.by_task:
        found = comparison.by_task[name]
        entry["tasks"] = {
            "base": found.base.to_json(),
            "aligned": found.aligned.to_json(),
            "difference": interval_json(found.difference, "mean"),
        }
    return entry


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """A measure is neither better nor worse: it has no win rate."""
    return {key: entry[key] for key in ("base", "aligned", "difference")}

"""A comparison on disk: ``report.json``, ``report.html``, ``grid.png`` and the scores of every pair."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .compare import Comparison
from .grid import picture_grid
from .html import render_html
from .selection import random_pairs

_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "peft")
GRID_PAIRS = 16


def write_report(
    comparison: Comparison,
    folder: str | Path,
    *,
    method: str,
    base_name: str,
    aligned_name: str,
    primary: str | None = None,
) -> dict[str, Any]:
    """Write the four files; each appears whole or not at all.

    Args:
        comparison: what was measured.
        folder: made when missing.
        method: name of the training method.
        base_name, aligned_name: how the two models are called in the report.
        primary: the score that picks and marks pictures; the first reward model when None.

    Returns:
        The content of ``report.json``.

    Raises:
        ConfigError: ``primary`` is not among the scores.
        DataError: the folder cannot be written.
    """
    primary = primary or next(iter(comparison.results))
    if primary not in comparison.results:
        raise ConfigError(f"primary must be one of the scores {', '.join(comparison.results)}, got {primary!r}.")
    folder = Path(folder)
    report = report_dict(comparison, method=method, base_name=base_name, aligned_name=aligned_name)
    grid = picture_grid(comparison, random_pairs(comparison, GRID_PAIRS), primary)
    html = render_html(comparison, report, primary)
    lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pair_records(comparison))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "pairs.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
        _write(folder / "grid.png", lambda path: grid.save(path, format="PNG"))
        _write(folder / "report.html", lambda path: path.write_text(html, encoding="utf-8"))
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        _write(folder / "report.json", lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"cannot write the report to {folder}: {reason}; free space or choose another folder."
        ) from error
    return report


def report_dict(comparison: Comparison, *, method: str, base_name: str, aligned_name: str) -> dict[str, Any]:
    """The content of ``report.json``: plain keys, null where a number is missing."""
    return {
        "method": method,
        "base": base_name,
        "aligned": aligned_name,
        "prompts": len(comparison.prompts),
        "seeds": len(comparison.seeds),
        "pairs": len(comparison.pairs),
        "scores": {name: result.to_json() for name, result in comparison.results.items()},
        "seconds": {stage: round(value, 2) for stage, value in comparison.seconds.items()},
        "sampling": asdict(comparison.sampling),
        "reward_models": comparison.scorers,
        "versions": {name: _version(name) for name in _PACKAGES},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def pair_records(comparison: Comparison) -> list[dict[str, Any]]:
    """One record per (prompt, seed) with the raw scores of both pictures: all that other statistics need."""

    def at(scores: dict[str, list[float]], index: int) -> dict[str, float | None]:
        return {name: None if values[index] != values[index] else values[index] for name, values in scores.items()}

    base, aligned = comparison.base_scores, comparison.aligned_scores
    return [
        {"prompt": prompt, "seed": seed, "base": at(base, i), "aligned": at(aligned, i)}
        for i, (prompt, seed) in enumerate(comparison.pairs)
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

"""A table of methods and scores, made from reports, that a paper can paste.

A row is one trained model; a cell the paired difference to its base with the 95 % interval. What all reports share is
said once under the table; what differs becomes a column, so that no row is compared under conditions it does not show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ..errors import ConfigError, DataError

FORMATS = ("markdown", "latex")
_MARKS = {"trained-on": "†", "related": "‡", "unknown": "?"}
_MARK_NOTES = {
    "†": "the score made the preferences that the model was trained on",
    "‡": "the score shares its parts with one that did",
    "?": "what the model was trained on is not recorded",
}
_LATEX_MARKS = {"†": r"$^{\dagger}$", "‡": r"$^{\ddagger}$", "?": r"$^{?}$"}


@dataclass(frozen=True)
class Row:
    """One row of the table: a model of a report, or the mean over the runs of a method.

    Args:
        label: the method.
        conditions: what it was measured and trained with, by name, as text.
        cells: by score: difference, low, high, role; None where the report has no such score.
    """

    label: str
    conditions: dict[str, str]
    cells: dict[str, tuple[float, float, float, str] | None]


def claims_table(
    reports: Sequence[str | Path], *, format: str = "markdown", scores: Sequence[str] | None = None
) -> str:
    """The table of some reports.

    Args:
        reports: ``report.json`` files, or the folders that hold them.
        format: ``markdown``, or ``latex`` with booktabs' rules.
        scores: which scores are columns; all when None.

    Raises:
        ConfigError: an unknown format, a score no report has, or one score measured by different scorers.
        DataError: a file is no report.
    """
    if format not in FORMATS:
        raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    read = [_read(Path(path)) for path in reports]
    if not read:
        raise ConfigError("expected reports, got none; give report.json of one or more evaluations.")
    known = list(dict.fromkeys(name for report in read for name in report["scores"]))
    unknown = [name for name in scores or [] if name not in known]
    if unknown:
        raise ConfigError(f"no report has the score {', '.join(unknown)}; there are {', '.join(known)}.")
    chosen = list(scores or known)
    _refuse_mixed_scorers(read, chosen)
    rows = [_row(report, model, chosen) for report in read for model in report["models"]]
    rows = _with_means(rows, chosen)
    names = list(dict.fromkeys(name for row in rows for name in row.conditions))
    values = {name: list(dict.fromkeys(row.conditions.get(name, "–") for row in rows)) for name in names}
    shared = {name: found[0] for name, found in values.items() if len(found) == 1}
    columns = [name for name in names if name not in shared]
    heads = ["method", *columns, *(f"Δ {name}" for name in chosen)]
    body = [[row.label, *(row.conditions.get(c, "–") for c in columns), *_cells(row, chosen)] for row in rows]
    notes = _notes(rows, shared)
    return _markdown(heads, body, notes) if format == "markdown" else _latex(heads, body, notes, len(columns) + 1)


def _read(path: Path) -> dict[str, Any]:
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no report of `diffalign evaluate`: {error}") from error
    if not isinstance(report, dict) or "scores" not in report:
        raise DataError(f"{file} is no report of `diffalign evaluate`: it has no scores.")
    first = {"name": "aligned", "method": report.get("method"), "scores": report["scores"]}
    return {"models": [first], **report, "file": str(file)}  # reports of earlier versions hold one model


def _refuse_mixed_scorers(reports: Iterable[dict[str, Any]], scores: Sequence[str]) -> None:
    for name in scores:
        seen: dict[str, str] = {}
        for report in reports:
            if name in report["scores"]:
                seen.setdefault(json.dumps(report.get("reward_models", {}).get(name), sort_keys=True), report["file"])
        if len(seen) > 1:
            first, second = list(seen.values())[:2]
            raise ConfigError(
                f"{name} is another scorer (or version) in {first} than in {second}, so its numbers cannot share a "
                "column; evaluate again with one version, or choose other scores with --score."
            )


def _row(report: dict[str, Any], model: dict[str, Any], scores: Sequence[str]) -> Row:
    sampling = report.get("sampling", {})
    conditions = {
        "base": report.get("base"),
        "training seed": model.get("training_seed"),
        "training commit": _short(model.get("training_commit")),
        "prompts": f"{report.get('prompts')}" + _in_brackets(report.get("prompt_set")),
        "prompts hash": report.get("prompts_hash"),
        "seeds a prompt": report.get("seeds"),
        "steps": sampling.get("steps"),
        "guidance": sampling.get("guidance"),
        "evaluation commit": _short(report.get("commit")),
    }
    cells = {}
    for name in scores:
        entry = model["scores"].get(name)
        difference = (entry or {}).get("difference", {})
        mean, bounds = difference.get("mean"), difference.get("ci95") or (math.nan, math.nan)
        role = (entry or {}).get("role", "unknown")
        cells[name] = None if mean is None else (float(mean), float(bounds[0]), float(bounds[1]), role)
    label = str(model.get("method") or model["name"])
    if len(report["models"]) > 1 and model["name"] not in (label, "aligned"):
        label = f"{label} ({model['name']})"
    known = {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in conditions.items() if v is not None}
    return Row(label, known, cells)


def _with_means(rows: list[Row], scores: Sequence[str]) -> list[Row]:
    """After the runs of a method that differ in their training seeds alone (or in the code's commit), their mean with
    Student's interval over the runs."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        measured = {k: v for k, v in row.conditions.items() if k != "training seed" and not k.endswith("commit")}
        groups.setdefault((row.label, *sorted(measured.items())), []).append(row)
    result = []
    for (label, *_), own in groups.items():
        result += own
        seeds = [row.conditions.get("training seed") for row in own]
        if len(own) > 1 and None not in seeds and len(set(seeds)) == len(own):
            shared = {k: v for k, v in own[0].conditions.items() if all(r.conditions.get(k) == v for r in own)}
            conditions = shared | {"training seed": f"mean of {len(own)}"}
            result.append(Row(label, conditions, {name: _mean([row.cells[name] for row in own]) for name in scores}))
    return result


def _mean(cells: Sequence[tuple[float, float, float, str] | None]) -> tuple[float, float, float, str] | None:
    known = [cell for cell in cells if cell is not None]
    if len(known) < len(cells):  # a mean over some of the runs would choose among them
        return None
    values = np.array([cell[0] for cell in known])
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    roles = {cell[3] for cell in known}
    role = next((role for role in _MARKS if role in roles), "hold-out")
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half), role


def _cells(row: Row, scores: Sequence[str]) -> list[str]:
    texts = []
    for name in scores:
        cell = row.cells[name]
        if cell is None:
            texts.append("–")
            continue
        mean, low, high, role = cell
        bounds = "no interval" if math.isnan(low) else f"[{low:+.3f}, {high:+.3f}]"
        texts.append(f"{mean:+.3f} {bounds}{_MARKS.get(role, '')}")
    return texts


def _notes(rows: Sequence[Row], shared: dict[str, str]) -> list[str]:
    notes = ["Δ: mean difference to the base on the same prompts and seeds, 95 % interval from resampling prompts"]
    if any(row.conditions.get("training seed", "").startswith("mean of") for row in rows):
        notes.append("means of runs: Student's 95 % interval over training seeds")
    used = {_MARKS.get(cell[3]) for row in rows for cell in row.cells.values() if cell is not None}
    notes += [f"{mark}: {meaning}" for mark, meaning in _MARK_NOTES.items() if mark in used]
    if shared:
        notes.append("all rows: " + ", ".join(f"{name} {value}" for name, value in shared.items()))
    return notes


def _markdown(heads: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _latex(heads: Sequence[str], body: Sequence[Sequence[str]], notes: Sequence[str], left: int) -> str:
    rows = [" & ".join(map(_tex, line)) + r" \\" for line in (heads, *body)]
    columns = "l" * left + "r" * (len(heads) - left)
    middle = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([*middle, r"\end{tabular}", *(f"% {_tex(note)}" for note in notes)])


def _tex(text: str) -> str:
    special: dict[str, str] = {character: "\\" + character for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"Δ": r"$\Delta$", "–": "--"} | _LATEX_MARKS
    return "".join(special.get(character, character) for character in text)


def _short(commit: object) -> str | None:
    """Twelve digits of a commit, and the mark of changed files."""
    if not isinstance(commit, str):
        return None
    digits, plus, changes = commit.partition("+")
    return digits[:12] + plus + changes


def _in_brackets(name: object) -> str:
    return f" ({name})" if isinstance(name, str) and not name.startswith("the list") else ""

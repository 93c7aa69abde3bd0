"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from .appearance import DIVERSITY, MEASURES
from .cards import picture_panels
from .charts import sweep_charts
from .compare import Comparison, TaskComparison
from .report import ModelResult
from .roles import MEANING, TRAINED_ON, UNKNOWN
from .selection import is_verdict
from .statistics import Interval, PairedResult


def render_html(results: Sequence[ModelResult], report: dict[str, Any], primary: str) -> str:
    """The whole page.

    Args:
        results: what was measured of each model.
        report: content of ``report.json``.
        primary: score that picks and marks pictures.
    """
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    one = len(results) == 1
    title = f"{report['method']}: aligned against base" if one else f"{len(results)} models against their base"
    body = "\n".join([
        f"<h1>{escape(title)}</h1>",
        _subtitle(report),
        *(_verdict(primary, result, several=not one) for result in results),
        _score_table(results),
        _sweep(results),
        _tasks(results),
        _appearance(results),
        *picture_panels(results, primary),
        _settings(report),
    ])  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def headline(name: str, result: PairedResult, verdict: bool) -> tuple[str, str]:
    """The result in one sentence, and whether it is ``better``, ``worse`` or ``unclear``.

    Args:
        name: the score.
        result: its statistics.
        verdict: True when the score is right (1) or wrong (0), which is then told in per cent.
    """
    difference = result.difference
    if result.n == 0:
        return f"{name} could judge none of the pairs.", "unclear"
    moved = (
        f"{name} goes from {result.base:.1%} to {result.aligned:.1%}"
        if verdict
        else f"{name} goes from {result.base:.4g} to {result.aligned:.4g}"
    )
    if difference.low != difference.low:
        return f"{moved}; one pair is too few for an interval.", "unclear"
    change = _interval_words(difference, verdict)
    if difference.low > 0:
        return f"{moved}: {change}. This is an improvement: the interval lies above zero.", "better"
    if difference.high < 0:
        return f"{moved}: {change}. This is a loss: the interval lies below zero.", "worse"
    return f"{moved}: {change}. The interval contains zero: this shows no clear difference.", "unclear"


def _interval_words(interval: Interval, verdict: bool) -> str:
    if verdict:
        return (
            f"{interval.mean * 100:+.1f} percentage points (95 % interval {interval.low * 100:+.1f} to "
            f"{interval.high * 100:+.1f})"
        )
    return f"{interval.mean:+.4g} (95 % interval {interval.low:+.4g} to {interval.high:+.4g})"


def _subtitle(report: dict[str, Any]) -> str:
    sampling = report["sampling"]
    parts = [
        f"base: {report['base']}",
        *(f"{model['name']}: {model['model']}" for model in report["models"]),
        f"{report['prompts']} prompts × {report['seeds']} seeds = {report['pairs']} pairs",
        f"{sampling['steps']} steps, guidance {sampling['guidance']:g}",
    ]
    return f'<p class="sub">{escape(" · ".join(parts))}</p>'


def _verdict(name: str, result: ModelResult, *, several: bool) -> str:
    paired = result.comparison.results[name]
    sentence, tone = headline(name, paired, is_verdict(result.comparison, name))
    shares = f"wins {paired.wins:.0%} of {paired.n} pairs, ties {paired.ties:.0%}, loses {paired.losses:.0%}"
    pairs = f" The aligned model {shares}." if paired.n else ""
    caution = ""
    if result.role(name) == TRAINED_ON:
        caution = f" {name} made this model's preferences, so this says little: look at the hold-out scores."
    who = f"<b>{escape(result.spec.name)}</b>: " if several else ""
    return f'<p class="verdict {tone}">{who}{escape(sentence + pairs + caution)}</p>'


def _score_table(results: Sequence[ModelResult]) -> str:
    rows = "\n".join(_row(result, name, len(results) > 1) for result in results for name in result.comparison.results)
    heads = ["model"] * (len(results) > 1) + [
        *("score", "base", "aligned", "difference", "95 % interval", "", "win rate", "win / tie / loss"),
        *("p (Holm)", "pairs"),
    ]  # fmt: skip
    roles = {result.role(name) for result in results for name in result.comparison.results}
    meaning = "; ".join(f"{role}: {MEANING[role]}" for role in MEANING if role in roles)
    advice = " Name the scores that made the preferences with --trained-on." if UNKNOWN in roles else ""
    tests = len(results) * len(results[0].comparison.results)
    return (
        "<h2>All scores</h2>"
        '<p class="what">What am I looking at: mean scores of the base and each model on the same prompts and seeds, '
        "and their paired difference with an interval from resampling prompts. If the interval excludes zero (dashed), "
        "the change is more than chance. A tie counts half a win.</p>"
        f"{_table(heads, rows)}"
        f'<p class="what">Roles. {escape(meaning)}.{advice} Each interval is for one comparison. {tests} '
        f"{'comparisons are' if tests > 1 else 'comparison is'} made here; the p-value is that of an exact sign test "
        "over prompts, adjusted by Holm's rule for all of them: below 0.05 the claim holds beside the others.</p>"
    )


def _row(result: ModelResult, name: str, several: bool) -> str:
    comparison = result.comparison
    paired, role = comparison.results[name], result.role(name)
    who = f"<td>{escape(result.spec.name)}</td>" if several else ""
    label = f'<td>{escape(name)} <span class="role {role}">{role}</span></td>'
    if paired.n == 0:
        return f"<tr>{who}{label}<td colspan='9'>no pair has both scores</td></tr>"
    difference, rate = paired.difference, paired.win_rate
    known = difference.low == difference.low
    tone = "better" if known and difference.low > 0 else "worse" if known and difference.high < 0 else ""
    span = f"{difference.low:+.4f} … {difference.high:+.4f}" if known else "too few pairs"
    margin = f" <small>{rate.low:.2f} … {rate.high:.2f}</small>" if known else ""
    missing = f" <small>({paired.missing} missing)</small>" if paired.missing else ""
    whisker = _whisker(name, difference) if known else ""
    p = result.holm.get(name, math.nan)
    cells = [
        f"{who}{label}<td>{paired.base:.4f}</td><td>{paired.aligned:.4f}</td>",
        f'<td class="{tone}">{difference.mean:+.4f}</td><td>{span}</td><td>{whisker}</td>',
        f"<td>{rate.mean:.3f}{margin}</td><td>{_bar(paired)}</td>",
        f"<td>{'–' if math.isnan(p) else '&lt; 0.001' if p < 0.001 else f'{p:.3f}'}</td><td>{paired.n}{missing}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _whisker(name: str, interval: Interval) -> str:
    """The interval as a line around its mean; zero is in the middle."""
    reach = max(abs(interval.low), abs(interval.high), 1e-12)
    x = [70 + 60 * value / reach for value in (interval.low, interval.mean, interval.high)]
    words = f"{name}: difference {interval.mean:+.4g}, from {interval.low:+.4g} to {interval.high:+.4g}"
    return (
        f'<svg width="110" viewBox="0 0 140 22" role="img" aria-label="{escape(words)}">'
        '<line class="zero" x1="70" x2="70" y1="1" y2="21"/>'
        f'<line class="range" x1="{x[0]:.1f}" x2="{x[2]:.1f}" y1="11" y2="11"/>'
        f'<circle class="point" cx="{x[1]:.1f}" cy="11" r="5"/></svg>'
    )


def _bar(result: PairedResult) -> str:
    words = f"wins {result.wins:.0%}, ties {result.ties:.0%}, losses {result.losses:.0%}"
    spans = "".join(
        f'<span class="{kind}" style="width:{share:.2%}"></span>'
        for kind, share in (("win", result.wins), ("tie", result.ties), ("loss", result.losses))
    )
    return f'<div class="bar" role="img" aria-label="{words}" title="{words}">{spans}</div>'


def _sweep(results: Sequence[ModelResult]) -> str:
    if len(results[0].sweep) < 2:
        return ""
    return (
        "<h2>Guidance</h2>"
        '<p class="what">What am I looking at: mean scores of every model at each guidance scale. Alignment can move '
        "the best scale: compare each model's own best with the base's own best, not only one scale. The best of "
        "several scales on the same pictures is a little flattered, for the base as for the models.</p>"
        f"{sweep_charts(results)}"
    )


def _tasks(results: Sequence[ModelResult]) -> str:
    blocks = []
    for name in results[0].comparison.by_task:
        found = [result.comparison.by_task[name] for result in results]
        heads = [f"{name}, by task", "base", *(result.spec.name for result in results), "results", "missing"]
        rows = [_overall_row(found)]
        for group, kind in ((found[0].base.dimensions, "dimensions"), (found[0].base.parts, "parts")):
            for task in group:
                rows.append(_task_row(task, [getattr(found[0].base, kind)[task]] + [
                    getattr(one.aligned, kind)[task] for one in found
                ]))  # fmt: skip
        blocks.append(_table(heads, "\n".join(rows)))
    if not blocks:
        return ""
    return (
        "<h2>Tasks</h2>"
        '<p class="what">What am I looking at: the mean of each task or dimension, and their plain mean as the overall '
        "value, so that tasks with many prompts do not weigh more. Missing answers are left out; the lower bound "
        f"counts them as 0. Single tasks have few prompts: read them as hints.</p>{''.join(blocks)}"
    )


def _overall_row(found: Sequence[TaskComparison]) -> str:
    cells = [_overall_cell(found[0].base.overall, found[0].base.lower, found[0].base.missing)]
    for one in found:
        change = one.difference
        words = (
            f" <small>({change.mean:+.3f}: {change.low:+.3f} … {change.high:+.3f})</small>"
            if change.low == change.low
            else ""
        )
        cells.append(_overall_cell(one.aligned.overall, one.aligned.lower, one.aligned.missing) + words)
    missing = [found[0].base.missing, *(one.aligned.missing for one in found)]
    shown = " / ".join(f"{share:.1%}" for share in missing)
    return f"<tr><td><b>overall</b></td>{''.join(f'<td>{cell}</td>' for cell in cells)}<td></td><td>{shown}</td></tr>"


def _overall_cell(value: Interval, lower: float, missing: float) -> str:
    shown = "–" if math.isnan(value.mean) else f"<b>{value.mean:.3f}</b>"
    return shown + (f" <small>at least {lower:.3f}</small>" if missing and lower == lower else "")


def _task_row(task: str, values: Sequence[Any]) -> str:
    cells = "".join(f"<td>{'–' if math.isnan(one.value) else f'{one.value:.3f}'}</td>" for one in values)
    missing = " / ".join(str(one.missing) for one in values)
    return f"<tr><td>{escape(task)}</td>{cells}<td>{values[0].n}</td><td>{missing}</td></tr>"


def _appearance(results: Sequence[ModelResult]) -> str:
    first = results[0].comparison
    if not first.appearance:
        return ""
    meaning = MEASURES | {DIVERSITY: "mean distance between two pictures of one prompt"}
    rows = []
    for name, paired in first.appearance.items():
        changes = "".join(_change_cell(result.comparison, name) for result in results)
        label = f"{escape(name)} <small>{escape(meaning[name])}</small>"
        rows.append(f"<tr><td>{label}</td><td>{paired.base:.4f}</td>{changes}</tr>")
    moved = "".join(f"<td>{sum(r.comparison.moved) / len(r.comparison.moved):.4f}</td>" for r in results)
    rows.append(f"<tr><td>moved <small>mean distance to the base's picture</small></td><td>0</td>{moved}</tr>")
    heads = ["measure", "base", *(f"change of {result.spec.name}" for result in results)]
    return (
        "<h2>Appearance</h2>"
        '<p class="what">What am I looking at: measures of the pictures themselves, none of them good or bad. A score '
        "that rises while diversity falls, or while saturation or sharpness moves far, is a sign of reward hacking: "
        f"look at the pictures below.</p>{_table(heads, chr(10).join(rows))}"
    )


def _change_cell(comparison: Comparison, name: str) -> str:
    paired = comparison.appearance[name]
    change = paired.difference
    if paired.n == 0:
        return "<td>–</td>"
    share = f", {change.mean / paired.base:+.0%}" if paired.base else ""
    span = f" <small>{change.low:+.4f} … {change.high:+.4f}{share}</small>" if change.low == change.low else ""
    return f"<td>{change.mean:+.4f}{span}</td>"


def _table(heads: Sequence[str], rows: str) -> str:
    head = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _settings(report: dict[str, Any]) -> str:
    kept = {key: value for key, value in report.items() if key not in ("scores", "models")}
    text = escape(json.dumps(kept, indent=2, ensure_ascii=False))
    return f"<details><summary>Settings, versions and times</summary><pre>{text}</pre></details>"

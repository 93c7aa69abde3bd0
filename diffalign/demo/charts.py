"""Plots as SVG text: they take the page's own text colour, so they are right in light and dark, and need no network."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ..evaluation.ratings import Rating
from ..evaluation.statistics import Interval
from .runs import PANELS, matching
from .tally import Standing

COLOURS = ("#3b82f6", "#d97706", "#059669", "#d946ef")  # 3 to 1 or more against white and near black
FEW = 40  # points of a curve that are each marked
Curve = tuple[list[int], list[float]]


def rate_chart(standings: Sequence[Standing], score: str) -> str:
    """Win rates with their intervals, one line a model, and the line of no difference."""
    shown = [s for s in standings if not math.isnan(s.rate.mean)]
    if not shown:
        return ""
    against = shown[0].against
    return _intervals(
        [(s.model, s.rate) for s in shown],
        title=f"share of wins against {_shortened(against)}, score {_shortened(score)}",
        middle=0.5,
        limits=(0.0, 1.0),
        form="{:.2f}",
    )


def rating_chart(ratings: Sequence[Rating]) -> str:
    """Elo points with their intervals, the strongest on top."""
    shown = [r for r in ratings if not math.isnan(r.elo.mean)]
    if len(shown) < 2:
        return ""
    return _intervals(
        [(r.name, r.elo) for r in shown], title="rating in Elo points, 95 % interval", middle=1000.0, form="{:.0f}"
    )


def curve_charts(curves: Mapping[str, Curve]) -> str:
    """The health panel: one small plot for each group of metrics that the run has."""
    panels = [(title, what, matching(curves, patterns)) for title, what, patterns in PANELS]
    return "".join(_curves(title, what, {n: curves[n] for n in names}) for title, what, names in panels if names)


def _intervals(
    rows: Sequence[tuple[str, Interval]],
    *,
    title: str,
    middle: float,
    form: str,
    limits: tuple[float, float] | None = None,
) -> str:
    """A line a model: its interval, its mean, and a broken line where nothing would differ."""
    bounds = [bound for _, interval in rows for bound in (interval.low, interval.high)]
    low, high = limits or (min(middle, *bounds), max(middle, *bounds))
    left, right, line, top = 112, 316, 24, 4
    bottom = top + line * len(rows)

    def x(value: float) -> float:
        return left + (value - low) / ((high - low) or 1.0) * (right - left)

    parts = [f'<path d="M{x(middle):.1f} {top}V{bottom}" stroke="currentColor" stroke-dasharray="3 3"/>']
    for index, (name, interval) in enumerate(rows):
        y, colour = top + line * (index + 0.5), COLOURS[index % len(COLOURS)]
        parts += [
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{html.escape(_shortened(name))}</text>',
            f'<path d="M{x(interval.low):.1f} {y}H{x(interval.high):.1f}" stroke="{colour}" stroke-width="2.5"/>',
            f'<circle cx="{x(interval.mean):.1f}" cy="{y}" r="4" fill="{colour}"/>',
        ]
    ends = [end for end in (low, high) if abs(x(end) - x(middle)) > 30]  # numbers must not overlap
    for value in (middle, *ends):
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 14}" text-anchor="middle">{form.format(value)}</text>')
    words = "; ".join(
        f"{name} {form.format(i.mean)}, from {form.format(i.low)} to {form.format(i.high)}" for name, i in rows
    )
    drawing = f'<svg viewBox="0 0 330 {bottom + 18}" font-size="11" fill="currentColor" aria-hidden="true">'
    return _described(title, f"{drawing}{''.join(parts)}</svg>", words)


def _curves(title: str, what: str, curves: Mapping[str, Curve]) -> str:
    """Lines over steps. Steps without a value are bridged: what is measured now and then is still one line."""
    lines = {}
    for name, (steps, values) in curves.items():
        points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        if points:
            lines[(name.partition("/")[2] or name).replace("_", " ")] = points
    if not lines:
        return ""
    every = [point for points in lines.values() for point in points]
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)
    left, right, top, bottom = 58, 322, 8, 116

    def x(step: float) -> float:
        return left + (step - first) / ((last - first) or 1) * (right - left)

    def y(value: float) -> float:
        return bottom - (value - low) / ((high - low) or 1.0) * (bottom - top)

    parts = []
    for value in dict.fromkeys((low, (low + high) / 2, high)):
        parts.append(f'<path d="M{left} {y(value):.1f}H{right}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{left - 5}" y="{y(value) + 4:.1f}" text-anchor="end">{_tick(value, high - low)}</text>')
    for step, anchor in dict.fromkeys(((first, "start"), (last, "end"))):
        parts.append(f'<text x="{x(step):.1f}" y="{bottom + 15}" text-anchor="{anchor}">step {step}</text>')
    legend, words = [], []
    for index, (label, points) in enumerate(lines.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [
            f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="2" fill="{colour}"/>' for s, v in points * (len(points) <= FEW)
        ]
        legend.append(f'<span><i style="background:{colour}"></i>{html.escape(label)}</span>')
        words.append(f"{label} from {points[0][1]:.4g} to {points[-1][1]:.4g} at step {points[-1][0]}")
    drawing = f'<svg viewBox="0 0 330 {bottom + 20}" font-size="11" fill="currentColor" aria-hidden="true">'
    figure = _described(title, f"{drawing}{''.join(parts)}</svg>", "; ".join(words))
    keys = f"<p class='legend' aria-hidden='true'>{' '.join(legend)}</p>" if len(legend) > 1 else ""
    return f"<figure>{figure}{keys}<figcaption>{html.escape(what)}</figcaption></figure>"


def _described(title: str, drawing: str, words: str) -> str:
    """The title wraps where the page is narrow; to a screen reader it is part of the words."""
    return (
        f'<div class="chart" role="img" aria-label="{html.escape(f"{title}: {words}.")}">'
        f'<p class="caption">{html.escape(title)}</p>{drawing}</div>'
    )


def _tick(value: float, span: float) -> str:
    """A number beside an axis; what is next to nothing there is 0."""
    return f"{0 if abs(value) < span / 50 else value:.3g}"


def _shortened(name: str, letters: int = 18) -> str:
    """The end of a long name."""
    return name if len(name) <= letters else f"…{name[-letters + 1 :]}"

"""Plots as SVG text: they take the page's own text colour, so they are right in light and dark, and need no network."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ..evaluation.ratings import Rating
from ..evaluation.statistics import Interval
from .runs import PANELS
from .tally import Standing

_TEXT = "#0a0b0c"  # a colour nothing else has; becomes the page's own
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#d946ef")  # readable on white and on near black


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


def curve_charts(curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    """The health panel: one small plot for each group of metrics that the run has."""
    panels = [(title, what, [n for n in names if n in curves]) for title, what, names in PANELS]
    return "".join(_curves(title, what, {n: curves[n] for n in names}) for title, what, names in panels if names)


def _intervals(
    rows: Sequence[tuple[str, Interval]],
    *,
    title: str,
    middle: float,
    form: str,
    limits: tuple[float, float] | None = None,
) -> str:
    figure, axes = _axes(5.2, 0.75 + 0.34 * len(rows))
    for index, (_, interval) in enumerate(rows):
        colour = COLOURS[index % len(COLOURS)]
        axes.plot([interval.low, interval.high], [index, index], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot([interval.mean], [index], "o", color=colour, markersize=7)
    axes.axvline(middle, color=_TEXT, linewidth=0.8, linestyle=(0, (3, 3)))
    axes.set_yticks(range(len(rows)), [_shortened(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if limits:
        axes.set_xlim(*limits)
    axes.set_title(title, fontsize=9, color=_TEXT, loc="left")
    words = "; ".join(
        f"{name} {form.format(i.mean)}, from {form.format(i.low)} to {form.format(i.high)}" for name, i in rows
    )
    return _svg(figure, f"{title}: {words}.")


def _curves(title: str, what: str, curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    figure, axes = _axes(3.6, 2.1)
    ends = []
    for index, (name, (steps, values)) in enumerate(curves.items()):
        label = name.rsplit("/", 1)[-1].replace("_", " ")
        axes.plot(steps, values, color=COLOURS[index], linewidth=1.5, label=label)
        present = [value for value in values if not math.isnan(value)]
        if present:
            ends.append(f"{label} from {present[0]:.4g} to {present[-1]:.4g} at step {steps[-1]}")
    if len(curves) > 1:
        axes.legend(fontsize=7, frameon=False, labelcolor=_TEXT)
    axes.set_title(title, fontsize=10, color=_TEXT, loc="left")
    caption = f"<figcaption>{html.escape(what)}</figcaption>"
    return f"<figure>{_svg(figure, f'{title}: ' + '; '.join(ends))}{caption}</figure>"


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=_TEXT, labelsize=8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_TEXT)
    axes.grid(color=_TEXT, alpha=0.12, linewidth=0.7)
    return figure, axes


def _svg(figure: Figure, words: str) -> str:
    """SVG with text as text, in the page's colour, that a screen reader reads as ``words``."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": words}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(_TEXT, "currentColor")
    drawing = re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', drawing, count=1)
    return f'<div class="chart" role="img" aria-label="{html.escape(words)}">{drawing}</div>'


def _shortened(name: str, letters: int = 26) -> str:
    """The end of a long name; a dollar sign would start a formula."""
    return (name if len(name) <= letters else f"…{name[-letters + 1 :]}").replace("$", r"\$")

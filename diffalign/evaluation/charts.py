"""Scores over guidance scales as plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .report import ModelResult

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 34


def sweep_charts(results: Sequence[ModelResult]) -> str:
    """One chart for each score, a line for the base and each model, and the numbers under it."""
    return f'<div class="charts">{"".join(_chart(results, name) for name in results[0].comparison.results)}</div>'


def _chart(results: Sequence[ModelResult], name: str) -> str:
    scales = [comparison.sampling.guidance for comparison in results[0].sweep]
    lines = {"base": [comparison.results[name].base for comparison in results[0].sweep]}
    lines |= {result.spec.name: [c.results[name].aligned for c in result.sweep] for result in results}
    known = [value for line in lines.values() for value in line if math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    margin = (high - low) * 0.08 or 0.5
    low, high = low - margin, high + margin

    def x(scale: float) -> float:
        return _LEFT + (scale - min(scales)) / (max(scales) - min(scales)) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text x="{_LEFT}" y="16">{escape(name)}</text>']
    for value in (low + margin, high - margin):
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for scale in scales:
        parts.append(
            f'<line class="zero" x1="{x(scale):.1f}" x2="{x(scale):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
        parts.append(f'<text x="{x(scale):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{scale:g}</text>')
    legend, words = [], []
    for number, (who, line) in enumerate(lines.items()):
        points = sorted((scale, value) for scale, value in zip(scales, line, strict=True) if math.isfinite(value))
        path = " ".join(f"{x(scale):.1f},{y(value):.1f}" for scale, value in points)
        parts.append(f'<polyline class="series s{number % 5}" points="{path}"/>')
        parts += [f'<circle class="dot s{number % 5}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="4"/>' for s, v in points]
        told = ", ".join(f"{value:.3g} at {scale:g}" for scale, value in points)
        legend.append(f'<li><span class="key s{number % 5}"></span>{escape(who)}: {told}</li>')
        words.append(f"{who}: {told}")
    label = escape(f"{name} over guidance. {'; '.join(words)}")
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<figure class="chart">{svg}<ul>{"".join(legend)}</ul></figure>'

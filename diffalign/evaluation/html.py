"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from PIL import Image

from .compare import Comparison, Picture
from .selection import is_verdict, most_changed, random_pairs
from .statistics import Interval, PairedResult

_CARDS = 9
_INLINE_SIDE = 384  # longest side of an inlined picture in pixels
_TINY = 128  # up to here pictures are kept as they are and shown with sharp pixels


def render_html(comparison: Comparison, report: dict[str, Any], primary: str) -> str:
    """The whole page.

    Args:
        comparison: what was measured.
        report: content of ``report.json``.
        primary: score that picks and marks pictures.
    """
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    title = f"{report['method']}: aligned against base"
    body = "\n".join([
        f"<h1>{escape(title)}</h1>",
        _subtitle(report),
        _verdict(primary, comparison.results[primary], is_verdict(comparison, primary)),
        _table(comparison),
        *_picture_panels(comparison, primary),
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
        f"aligned: {report['aligned']}",
        f"{report['prompts']} prompts × {report['seeds']} seeds = {report['pairs']} pairs",
        f"{sampling['steps']} steps, guidance {sampling['guidance']:g}",
    ]
    return f'<p class="sub">{escape(" · ".join(parts))}</p>'


def _verdict(name: str, result: PairedResult, verdict: bool) -> str:
    sentence, tone = headline(name, result, verdict)
    shares = f"wins {result.wins:.0%} of {result.n} pairs, ties {result.ties:.0%}, loses {result.losses:.0%}"
    pairs = f" The aligned model {shares}."
    return f'<p class="verdict {tone}">{escape(sentence + (pairs if result.n else ""))}</p>'


def _table(comparison: Comparison) -> str:
    rows = "\n".join(_row(name, result) for name, result in comparison.results.items())
    heads = ["score", "base", "aligned", "difference", "95 % interval", "", "win rate", "win / tie / loss", "pairs"]
    return (
        "<h2>All scores</h2>"
        '<p class="what">What am I looking at: mean scores of both models on the same prompts and seeds, and their '
        "paired difference with an interval from resampling prompts. If the interval excludes zero (dashed), the "
        "change is more than chance. A tie counts half a win.</p>"
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _row(name: str, result: PairedResult) -> str:
    difference, rate = result.difference, result.win_rate
    if result.n == 0:
        return f"<tr><td>{escape(name)}</td><td colspan='8'>no pair has both scores</td></tr>"
    known = difference.low == difference.low
    tone = "better" if known and difference.low > 0 else "worse" if known and difference.high < 0 else ""
    span = f"{difference.low:+.4f} … {difference.high:+.4f}" if known else "too few pairs"
    margin = f" <small>{rate.low:.2f} … {rate.high:.2f}</small>" if known else ""
    missing = f" <small>({result.missing} missing)</small>" if result.missing else ""
    whisker = _whisker(name, difference) if known else ""
    cells = [
        f"<td>{escape(name)}</td><td>{result.base:.4f}</td><td>{result.aligned:.4f}</td>",
        f'<td class="{tone}">{difference.mean:+.4f}</td><td>{span}</td><td>{whisker}</td>',
        f"<td>{rate.mean:.3f}{margin}</td><td>{_bar(result)}</td><td>{result.n}{missing}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _whisker(name: str, interval: Interval) -> str:
    """The interval as a line around its mean; zero is in the middle."""
    reach = max(abs(interval.low), abs(interval.high), 1e-12)
    x = [70 + 60 * value / reach for value in (interval.low, interval.mean, interval.high)]
    words = f"{name}: difference {interval.mean:+.4g}, from {interval.low:+.4g} to {interval.high:+.4g}"
    return (
        f'<svg width="140" height="22" role="img" aria-label="{escape(words)}">'
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


def _picture_panels(comparison: Comparison, primary: str) -> list[str]:
    better = most_changed(comparison, primary, _CARDS, better=True)
    worse = most_changed(comparison, primary, _CARDS, better=False)
    fair = random_pairs(comparison, _CARDS)
    return [
        _panel(
            "Random pairs",
            "a fair sample: each prompt drawn by both models from the same noise. Judge these first.",
            comparison, fair,
        ),
        _panel(
            "Worst regressions",
            f"the pairs that lost most under {primary}. Look for what the model forgot, or for a mistake of the score.",
            comparison, worse, f"No pair got worse under {primary}.",
        ),
        _panel(
            "Largest improvements",
            f"the pairs that gained most under {primary}: picked for that, so not typical.",
            comparison, better, f"No pair got better under {primary}.",
        ),
    ]  # fmt: skip


def _panel(title: str, what: str, comparison: Comparison, chosen: Sequence[int], empty: str = "") -> str:
    cards = "\n".join(_card(comparison, index) for index in chosen)
    body = f'<div class="cards">{cards}</div>' if chosen else f"<p>{escape(empty)}</p>"
    return f'<h2>{title}</h2><p class="what">What am I looking at: {escape(what)}</p>{body}'


def _card(comparison: Comparison, index: int) -> str:
    prompt, seed = comparison.pairs[index]
    sides = "".join(
        _side(name, pictures[index], f"{prompt} (seed {seed})", {n: v[index] for n, v in scores.items()}, comparison)
        for name, pictures, scores in (
            ("base", comparison.base_pictures, comparison.base_scores),
            ("aligned", comparison.aligned_pictures, comparison.aligned_scores),
        )
    )
    caption = f"{escape(prompt)} <small>seed {seed}</small>"
    return f'<figure class="card"><figcaption>{caption}</figcaption><div class="sides">{sides}</div></figure>'


def _side(name: str, picture: Picture, title: str, scores: dict[str, float], comparison: Comparison) -> str:
    lines, words = [], []
    for score, value in scores.items():
        shown, tone = "no score" if value != value else f"{value:.3g}", ""
        if value == value and is_verdict(comparison, score):
            shown, tone = ("✓ right", "right") if value == 1.0 else ("✗ wrong", "wrong")
        lines.append(f'<li>{escape(score)} <span class="{tone}">{shown}</span></li>')
        words.append(f"{score} {shown.lstrip('✓✗ ')}")
    alt = f"{name} model: {title}; {', '.join(words)}"
    data, tiny = _inline(picture)
    return (
        f'<div><b>{name}</b><img class="{"tiny" if tiny else ""}" src="{data}" alt="{escape(alt)}" loading="lazy">'
        f"<ul>{''.join(lines)}</ul></div>"
    )


def _inline(picture: Picture) -> tuple[str, bool]:
    """A data address, and whether the picture is shown with sharp pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    image = image.convert("RGB")
    tiny = max(image.size) <= _TINY
    image.thumbnail((_INLINE_SIDE, _INLINE_SIDE))
    buffer = io.BytesIO()
    if tiny:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=88)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", tiny


def _settings(report: dict[str, Any]) -> str:
    kept = {key: value for key, value in report.items() if key != "scores"}
    text = escape(json.dumps(kept, indent=2, ensure_ascii=False))
    return f"<details><summary>Settings, versions and times</summary><pre>{text}</pre></details>"

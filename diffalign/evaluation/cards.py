"""The pictures of the report: which pairs are shown, and how."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from .pictures import Picture, open_picture
from .report import ModelResult
from .selection import is_verdict, most_changed, most_moved, random_pairs

_CARDS = 9
_INLINE_SIDE = 384  # longest side of an inlined picture in pixels
_TINY = 128  # up to here pictures are kept as they are and shown with sharp pixels


def picture_panels(results: Sequence[ModelResult], primary: str) -> list[str]:
    """Worst regressions of each model first, then where pictures differ most, a fair sample, and the best."""
    several = len(results) > 1
    count = _CARDS if not several else 6
    panels = []
    for result in results:
        of = f" of {result.spec.name}" if several else ""
        what = (
            f"the pairs that lost most under {primary}. Look for what the model forgot, or for a mistake of the score."
        )
        worst = most_changed(result.comparison, primary, count, better=False)
        panels.append(_panel(f"Worst regressions{of}", what, results, worst, f"No pair got worse under {primary}."))
    for result in results:
        of = f" of {result.spec.name}" if several else ""
        moved = most_moved(result.comparison, count)
        what = (
            "the pairs whose pictures differ most, whatever any score says. Look for a change of style or a collapse."
        )
        panels.append(_panel(f"Largest changes{of}", what, results, moved, "No picture changed."))
    fair = random_pairs(results[0].comparison, count)
    what = "a fair sample: each prompt drawn by all models from the same noise. Judge a model by these."
    panels.append(_panel("Random pairs", what, results, fair))
    for result in results:
        of = f" of {result.spec.name}" if several else ""
        what = f"the pairs that gained most under {primary}: picked for that, so not typical."
        best = most_changed(result.comparison, primary, count, better=True)
        panels.append(_panel(f"Largest improvements{of}", what, results, best, f"No pair got better under {primary}."))
    return panels


def _panel(title: str, what: str, results: Sequence[ModelResult], chosen: Sequence[int], empty: str = "") -> str:
    cards = "\n".join(_card(results, index) for index in chosen)
    body = f'<div class="cards n{min(len(results), 4)}">{cards}</div>' if chosen else f"<p>{escape(empty)}</p>"
    return f'<h2>{escape(title)}</h2><p class="what">What am I looking at: {escape(what)}</p>{body}'


def _card(results: Sequence[ModelResult], index: int) -> str:
    first = results[0].comparison
    prompt, seed = first.pairs[index]
    sides = [_side("base", first.base_pictures[index], f"{prompt} (seed {seed})", _at(results[0], index, "base"))]
    for result in results:
        picture = result.comparison.aligned_pictures[index]
        sides.append(_side(result.spec.name, picture, f"{prompt} (seed {seed})", _at(result, index, "aligned")))
    caption = f"{escape(prompt)} <small>seed {seed}</small>"
    return f'<figure class="card"><figcaption>{caption}</figcaption><div class="sides">{"".join(sides)}</div></figure>'


def _at(result: ModelResult, index: int, side: str) -> list[tuple[str, float, bool]]:
    """(score, value, whether it is a verdict) of one picture."""
    comparison = result.comparison
    scores = comparison.base_scores if side == "base" else comparison.aligned_scores
    return [(name, values[index], is_verdict(comparison, name)) for name, values in scores.items()]


def _side(name: str, picture: Picture, title: str, scores: list[tuple[str, float, bool]]) -> str:
    lines, words = [], []
    for score, value, verdict in scores:
        shown, tone = "no score" if value != value else f"{value:.3g}", ""
        if value == value and verdict:
            shown, tone = ("✓ right", "right") if value == 1.0 else ("✗ wrong", "wrong")
        lines.append(f'<li>{escape(score)} <span class="{tone}">{shown}</span></li>')
        words.append(f"{score} {shown.lstrip('✓✗ ')}")
    alt = f"{name} model: {title}; {', '.join(words)}"
    data, tiny = _inline(picture)
    return (
        f'<div><b>{escape(name)}</b><img class="{"tiny" if tiny else ""}" src="{data}" alt="{escape(alt)}" '
        f'loading="lazy"><ul>{"".join(lines)}</ul></div>'
    )


def _inline(picture: Picture) -> tuple[str, bool]:
    """A data address, and whether the picture is shown with sharp pixels."""
    image = open_picture(picture)
    tiny = max(image.size) <= _TINY
    image.thumbnail((_INLINE_SIDE, _INLINE_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if tiny:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=88)
    kind = "png" if tiny else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", tiny

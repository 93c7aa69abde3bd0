"""One picture that shows base and aligned side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .compare import Comparison
from .pictures import Picture
from .selection import is_verdict

_COLUMNS = 8
_SIDE = 128  # twice a picture of the shapes world
_GAP = 10
_BADGE = 22
_STEP = _SIDE + _BADGE + 6 + _GAP  # from one column to the next: the badge stands beside its picture, hiding nothing
_LABEL = 84  # room on the left for the names of the rows
_CAPTION_LINES = 3
_INK, _FAINT, _PAPER = (28, 30, 34), (104, 110, 120), (255, 255, 255)
_RIGHT, _WRONG = (0, 120, 90), (200, 70, 20)  # apart for every kind of colour vision; shape says it too


def picture_grid(comparison: Comparison, chosen: Sequence[int], primary: str) -> Image.Image:
    """Pairs in blocks: caption, the base's picture, the aligned model's picture below it.

    Args:
        comparison: what was measured.
        chosen: numbers of the pairs.
        primary: score that marks the pictures: right or wrong for a verdict, else its value.

    Returns:
        An RGB image.
    """
    columns = min(_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    small, normal, title = _font(12), _font(14), _font(18)
    verdict = is_verdict(comparison, primary)
    caption_height, score_height = 16 * _CAPTION_LINES + 4, 0 if verdict else 18
    block = caption_height + 2 * (_SIDE + score_height) + _GAP
    top = 62
    width = _LABEL + columns * _STEP
    sheet = Image.new("RGB", (max(width, 640), top + rows * (block + 2 * _GAP)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, 10), "Same prompt, same seed: base above, aligned below", _INK, font=title)
    meaning = f"tick: right under {primary}, cross: wrong" if verdict else f"number: {primary}, higher is better"
    pen.text((_GAP, 36), f"A random sample, not the best ones ({meaning}).", _FAINT, font=normal)
    for place, index in enumerate(chosen):
        x = _LABEL + place % columns * _STEP
        y = top + place // columns * (block + 2 * _GAP)
        lines = _wrap(comparison.pairs[index][0], pen, small)
        for line, text in enumerate(lines, _CAPTION_LINES - len(lines)):
            pen.text((x, y + 16 * line), text, _INK, font=small)
        y += caption_height
        sides = (("base", comparison.base_pictures, comparison.base_scores),
                 ("aligned", comparison.aligned_pictures, comparison.aligned_scores))  # fmt: skip
        for name, pictures, scores in sides:
            if place % columns == 0:
                pen.text((_GAP, y + _SIDE // 2 - 9), name, _INK, font=normal)
            sheet.paste(fitted(pictures[index], _SIDE), (x, y))
            pen.rectangle((x - 1, y - 1, x + _SIDE, y + _SIDE), outline=(208, 212, 218))
            value = scores[primary][index]
            if verdict and value == value:
                _mark(sheet, (x + _SIDE + 6, y + _SIDE - _BADGE), right=value == 1.0)
            elif not verdict:
                pen.text((x, y + _SIDE + 2), "no score" if value != value else f"{value:.3g}", _FAINT, font=small)
            y += _SIDE + score_height + (4 if name == "base" else 0)
    return sheet


def fitted(picture: Picture, side: int) -> Image.Image:
    """The whole picture in a square of ``side`` pixels; tiny ones keep their sharp pixels."""
    image = picture if isinstance(picture, Image.Image) else Image.open(picture)
    image = image.convert("RGB")
    longest = max(image.size)
    if longest * 2 <= side:
        times = side // longest
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), (235, 237, 240))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _mark(sheet: Image.Image, corner: tuple[int, int], *, right: bool) -> None:
    """A badge, drawn four times as large so that its edges are smooth."""
    size, scale = _BADGE, 4
    badge = Image.new("RGBA", (size * scale, size * scale), (0, 0, 0, 0))
    pen = ImageDraw.Draw(badge)
    n = size * scale - 1
    pen.ellipse((0, 0, n, n), fill=_RIGHT if right else _WRONG)
    if right:
        tick = [(0.27 * n, 0.52 * n), (0.44 * n, 0.69 * n), (0.74 * n, 0.33 * n)]
        pen.line(tick, fill="white", width=11, joint="curve")
    else:
        pen.line([(0.32 * n, 0.32 * n), (0.68 * n, 0.68 * n)], fill="white", width=11)
        pen.line([(0.68 * n, 0.32 * n), (0.32 * n, 0.68 * n)], fill="white", width=11)
    badge = badge.resize((size, size), Image.Resampling.LANCZOS)
    sheet.paste(badge, corner, badge)


def _wrap(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """At most three lines as wide as a picture and its badge; an ellipsis where the prompt is longer."""
    letter = max(pen.textlength(text, font=font) / max(len(text), 1), 1)
    width = max(int((_SIDE + _BADGE) / letter), 1)
    return textwrap.wrap(text, width, max_lines=_CAPTION_LINES, placeholder="…")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu where the system has it, for its many scripts; else the font inside Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)

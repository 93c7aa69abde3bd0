"""Draw captions of the shapes world as 64 x 64 pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from .grammar import BACKGROUNDS, COLORS, Caption

SIZE = 64
Color = tuple[int, ...] | int | float | None
#: Pictures are drawn so many times larger, and averaged.
SUPERSAMPLE = 4
_SMALL, _LARGE = (7.0, 8.5), (10.5, 12.5)
#: Distance from the picture's centre at which a named position lies, in pixels.
_OFFSET = (14.0, 18.0)


def render(caption: Caption, rng: np.random.Generator) -> Image.Image:
    """One picture in which the caption holds; everything it leaves open is drawn at random.

    Returns:
        An RGB image of 64 x 64 pixels.
    """
    background = caption.background or str(rng.choice(list(BACKGROUNDS)))
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLE,) * 2, jitter(BACKGROUNDS[background], rng, 6))
    draw = ImageDraw.Draw(canvas)
    for (color, shape), (x, y, half) in zip(_things(caption), _layout(caption, rng), strict=True):
        draw_shape(draw, shape, x, y, half, jitter(COLORS[color], rng, 10), background=canvas.getpixel((0, 0)))
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, half: float, fill: Color, background: Color
) -> None:
    """Draw one shape that fills the square of half-extent ``half`` around (x, y), in unscaled pixels."""
    s = SUPERSAMPLE
    left, top, right, bottom = (x - half) * s, (y - half) * s, (x + half) * s, (y + half) * s
    if shape == "square":
        draw.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        draw.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=fill)
    elif shape == "cross":
        arm = half * s / 3
        cx, cy = (left + right) / 2, (top + bottom) / 2
        draw.rectangle((left, cy - arm, right, cy + arm), fill=fill)
        draw.rectangle((cx - arm, top, cx + arm, bottom), fill=fill)
    elif shape == "ring":
        hole = half * s * 0.5
        cx, cy = (left + right) / 2, (top + bottom) / 2
        draw.ellipse((left, top, right, bottom), fill=fill)
        draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=background)
    else:
        raise ValueError(f"unknown shape {shape!r}")


def _things(caption: Caption) -> list[tuple[str, str]]:
    return list(caption.things) if caption.kind == "pair" else [caption.things[0]] * caption.number


def _layout(caption: Caption, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre and half-extent of each thing, as (x, y, half)."""
    if caption.kind == "single":
        half = _half_extent(rng)
        return [(*_single_position(caption.position, half, rng), half)]
    if caption.kind == "pair":
        return _pair_layout(caption.relation, rng)
    return _scattered(caption.number, rng)


def _single_position(position: str | None, half: float, rng: np.random.Generator) -> tuple[float, float]:
    if position is None:
        x, y = rng.uniform(half + 2, SIZE - half - 2, 2)
        return float(x), float(y)
    along, across = rng.uniform(*_OFFSET), rng.uniform(-5, 5)
    dx, dy = {
        "left": (-along, across),
        "right": (along, across),
        "top": (across, -along),
        "bottom": (across, along),
        "center": (across * 0.6, rng.uniform(-3, 3)),
    }[position]
    return SIZE / 2 + dx, SIZE / 2 + dy


def _pair_layout(relation: str | None, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    halves = _half_extent(rng), _half_extent(rng)
    gap = rng.uniform(15, 18)
    shift = rng.uniform(-5, 5, 2)
    first, second = -gap, gap
    if relation in ("right of", "below"):
        first, second = second, first
    centres = [(first, shift[0]), (second, shift[1])]
    if relation in ("above", "below"):
        centres = [(across, along) for along, across in centres]
    return [(SIZE / 2 + dx, SIZE / 2 + dy, half) for (dx, dy), half in zip(centres, halves, strict=True)]


def _scattered(number: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Small things of one size that keep at least four pixels of air between them."""
    half = rng.uniform(*_SMALL)
    while True:
        centres: list[np.ndarray] = []
        for _ in range(50):
            point = rng.uniform(half + 2, SIZE - half - 2, 2)
            if all(np.abs(point - other).max() > 2 * half + 4 for other in centres):
                centres.append(point)
            if len(centres) == number:
                return [(float(x), float(y), float(half)) for x, y in centres]


def _half_extent(rng: np.random.Generator) -> float:
    return float(rng.uniform(*(_SMALL if rng.random() < 0.5 else _LARGE)))


def jitter(rgb: tuple[int, int, int], rng: np.random.Generator, amount: int) -> tuple[int, int, int]:
    """A colour near another: each channel in [0, 255] moves by at most ``amount``."""
    return tuple(int(v) for v in np.clip(np.array(rgb) + rng.integers(-amount, amount + 1, 3), 0, 255))  # type: ignore[return-value]

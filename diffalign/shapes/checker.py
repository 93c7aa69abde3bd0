"""Read a picture of the shapes world back and say how much of a caption holds in it.

Every pixel is explained as a mixture of the background and one colour; connected patches of colour are things;
a thing's shape is the template with the largest overlap. The checker sees only pixels and the prompt string.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from .grammar import BACKGROUNDS, COLORS, SHAPES, Caption, parse
from .renderer import SIZE, draw_shape

_GRID = 16  # templates and things are compared on a 16 x 16 raster of their bounding box
_MIN_AREA = 30.0  # soft pixels; the smallest drawn shape (a cross of half-extent 7) covers about 109
_MIN_OVERLAP = 0.72
_MAX_RESIDUAL = 60.0  # RGB distance beyond which a pixel is no mixture of background and a named colour
_MIN_SHARE = 0.8  # of a thing's inner pixels that must vote for its colour
_POSITION_MARGIN = 8.0  # pixels between "in the center" and a named side


@dataclass(frozen=True)
class Thing:
    """A patch of colour: centre and half-extent in pixels; colour None when mixed, shape None when nothing fits."""

    color: str | None
    shape: str | None
    x: float
    y: float
    half: float


@dataclass(frozen=True)
class Verdict:
    """``strict``: every claim of the caption holds. ``soft``: the share of claims that hold, in [0, 1]."""

    strict: bool
    soft: float
    claims: dict[str, bool]


def check(image: Image.Image | np.ndarray, prompt: str | Caption) -> Verdict:
    """Judge one picture.

    Args:
        image: square RGB picture, PIL or uint8 array (H, W, 3) in [0, 255]; brought to 64 x 64, for which all limits
            of this file are meant. From 48 x 48 up true pictures pass as they do at 64; at 32 x 32 one in a hundred
            fails.
        prompt: a caption of the shapes world.

    Raises:
        ValueError: the prompt is not a caption of this world, or the picture is not square.
    """
    caption = prompt if isinstance(prompt, Caption) else parse(prompt)
    return judge(*read(image), caption)


def judge(background: str, things: list[Thing], caption: Caption) -> Verdict:
    """Hold a caption against what :func:`read` found in a picture."""
    claims: dict[str, bool] = {"number": len(things) == caption.number}
    if caption.background is not None:
        claims["background"] = background == caption.background
    if caption.kind == "pair":
        claims |= _pair_claims(caption, things)
    else:
        claims |= _same_things_claims(caption, things)
    return Verdict(all(claims.values()), float(np.mean(list(claims.values()))), claims)


def read(image: Image.Image | np.ndarray) -> tuple[str, list[Thing]]:
    """The background's name and the things found, largest first."""
    pixels = as_array(image)
    background, base = _background(pixels)
    alpha, color, residual = _unmix(pixels, base)
    foreground = (alpha > 0.5) | (residual > _MAX_RESIDUAL)
    labels, count = ndimage.label(foreground)
    things = [_thing(labels == i, alpha, color) for i in range(1, count + 1)]
    return background, sorted((t for t in things if t is not None), key=lambda t: -t.half)


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """(64, 64, 3) fp32 in [0, 255] from a square picture.

    Raises:
        ValueError: the picture is not square.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    image = image.convert("RGB")
    if image.width != image.height:  # squeezed, a circle would be none
        raise ValueError(f"pictures of the shapes world are square; got {image.width} x {image.height} pixels.")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32)


def _background(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    base = np.median(border, axis=0)
    name = min(BACKGROUNDS, key=lambda n: float(np.linalg.norm(base - np.array(BACKGROUNDS[n]))))
    return name, base


def _unmix(pixels: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per pixel: coverage alpha (H, W), index of the best colour (H, W), distance to that mixture (H, W)."""
    palette = np.array(list(COLORS.values()), dtype=np.float32) - base  # (K, 3)
    offset = pixels - base
    length = np.maximum((palette**2).sum(1), 1.0)  # a background may happen to be one of the colours
    alpha = np.clip(np.einsum("hwc,kc->khw", offset, palette) / length[:, None, None], 0.0, 1.15)
    distance = np.linalg.norm(offset[None] - alpha[..., None] * palette[:, None, None], axis=-1)
    best = distance.argmin(0)
    rows, cols = np.indices(best.shape)
    return alpha[best, rows, cols], best, distance[best, rows, cols]


def _thing(mask: np.ndarray, alpha: np.ndarray, color: np.ndarray) -> Thing | None:
    soft = np.where(ndimage.binary_dilation(mask, iterations=2), np.minimum(alpha, 1.0), 0.0)
    core = mask & (alpha > 0.7)
    if soft.sum() < _MIN_AREA or not core.any():
        return None
    votes = np.bincount(color[core], minlength=len(COLORS))
    left, right = _extent(soft.max(axis=0), np.any(mask, axis=0))
    top, bottom = _extent(soft.max(axis=1), np.any(mask, axis=1))
    width, height = right - left, bottom - top
    shape = None
    if 0.72 < width / height < 1.4:
        crop = Image.fromarray(soft.astype(np.float32)).transform(
            (_GRID, _GRID), Image.Transform.EXTENT, (left, top, right, bottom), Image.Resampling.BILINEAR
        )
        patch = np.asarray(crop)
        overlap = {s: np.minimum(patch, t).sum() / np.maximum(patch, t).sum() for s, t in _templates().items()}
        best = max(overlap, key=lambda s: overlap[s])
        shape = best if overlap[best] >= _MIN_OVERLAP else None
    name = list(COLORS)[int(votes.argmax())] if votes.max() >= _MIN_SHARE * votes.sum() else None
    return Thing(name, shape, (left + right) / 2, (top + bottom) / 2, (width + height) / 4)


def _extent(profile: np.ndarray, inside: Any) -> tuple[float, float]:
    """Sub-pixel start and end of a soft profile along one axis: partial coverage counts as part of a pixel."""
    first, last = np.flatnonzero(inside)[[0, -1]]
    before = profile[first - 1] if first > 0 else 0.0
    after = profile[last + 1] if last + 1 < len(profile) else 0.0
    start = first + 1 - profile[first] - (before if before < 0.5 else 0.0)
    end = last + profile[last] + (after if after < 0.5 else 0.0)
    return float(start), float(end)


@cache
def _templates() -> dict[str, np.ndarray]:
    """Coverage of each shape on the raster of its own bounding box."""
    result = {}
    for shape in SHAPES:
        canvas = Image.new("L", (_GRID * 8, _GRID * 8), 0)
        draw_shape(ImageDraw.Draw(canvas), shape, _GRID, _GRID, _GRID, 255, background=0)
        result[shape] = np.asarray(canvas.resize((_GRID, _GRID), Image.Resampling.BOX), dtype=np.float32) / 255
    return result


def _same_things_claims(caption: Caption, things: list[Thing]) -> dict[str, bool]:
    color, shape = caption.things[0]
    claims = {
        "color": bool(things) and all(t.color == color for t in things),
        "shape": bool(things) and all(t.shape == shape for t in things),
    }
    if caption.position is not None:
        claims["position"] = bool(things) and _position(things[0]) == caption.position
    return claims


def _position(thing: Thing) -> str | None:
    dx, dy = thing.x - SIZE / 2, thing.y - SIZE / 2
    if max(abs(dx), abs(dy)) <= _POSITION_MARGIN:
        return "center"
    if abs(abs(dx) - abs(dy)) < 1.0:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def _pair_claims(caption: Caption, things: list[Thing]) -> dict[str, bool]:
    first, second = _assign(caption, things)
    (c1, s1), (c2, s2) = caption.things
    claims = {
        "first color": first is not None and first.color == c1,
        "first shape": first is not None and first.shape == s1,
        "second color": second is not None and second.color == c2,
        "second shape": second is not None and second.shape == s2,
    }
    claims["relation"] = first is not None and second is not None and _relation(first, second) == caption.relation
    return claims


def _assign(caption: Caption, things: list[Thing]) -> tuple[Thing | None, Thing | None]:
    """Which two of the things the caption's two names fit best; the relation only breaks ties."""

    def fit(thing: Thing, name: tuple[str, str]) -> float:
        return (thing.color == name[0]) + (thing.shape == name[1])

    best = -1.0
    choice: tuple[Thing | None, Thing | None] = (None, None)
    for i, a in enumerate(things):
        if fit(a, caption.things[0]) > best and len(things) == 1:
            best, choice = fit(a, caption.things[0]), (a, None)
        for j, b in enumerate(things):
            if i != j:
                score = (
                    fit(a, caption.things[0]) + fit(b, caption.things[1]) + 0.5 * (_relation(a, b) == caption.relation)
                )
                if score > best:
                    best, choice = score, (a, b)
    return choice


def _relation(first: Thing, second: Thing) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"

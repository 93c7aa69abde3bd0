"""One drawn picture: its bytes, where it came from, and whether it may be ranked."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from .sampling import NOT_FINITE, UNSAFE

THUMBNAIL = 16  # pixels; enough to tell pictures of one prompt apart, cheap enough to keep
_BLANK_LEVELS = 3  # of 256; VAEs leave some noise on an even field


@dataclass(frozen=True)
class Candidate:
    """A picture of a prompt.

    Args:
        pipeline: name of what drew it.
        source: the keys of the schema's ``SOURCE``.
        data: encoded bytes; empty when drawing failed.
        problem: why it is not ranked; empty when it is.
        thumbnail: (16, 16, 3) uint8, as bytes; empty when unknown.
    """

    pipeline: str
    source: dict[str, Any]
    data: bytes = b""
    problem: str = ""
    thumbnail: bytes = b""


@dataclass
class Row:
    """A prompt and everything known about its pictures.

    Args:
        prompt: the text.
        candidates: all of them, the bad ones too.
        scores: by reward model one value per candidate, NaN where missing or not asked.
        comparisons: by judge the probability that the first is better, for all pairs (i < j) of usable candidates, in
            the order of ``itertools.combinations``; NaN where missing.
        distances: of the same pairs, how far apart a reward model's embeddings are; None: thumbnails tell.
    """

    prompt: str
    candidates: list[Candidate]
    scores: dict[str, list[float]] = field(default_factory=dict)
    comparisons: dict[str, list[float]] = field(default_factory=dict)
    distances: list[float] | None = None

    @property
    def usable(self) -> list[int]:
        """Numbers of the candidates that may be ranked."""
        return [number for number, candidate in enumerate(self.candidates) if not candidate.problem]


def encode(image: Image.Image, kind: str, quality: int | None) -> bytes:
    """PNG, WebP (without loss unless a quality is given) or JPEG bytes."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {}
    if kind == "jpeg":
        options = {"quality": quality or 95, "subsampling": 0}
    elif kind == "webp":
        options = {"lossless": True} if quality is None else {"quality": quality}
    image.convert("RGB").save(buffer, format=kind, **options)
    return buffer.getvalue()


def problem_of(image: Image.Image) -> str:
    """Why a picture cannot be ranked, judged by itself; empty when it can."""
    for mark in (NOT_FINITE, UNSAFE):
        if image.info.get(mark):
            return mark
    low, high = zip(*image.convert("RGB").getextrema(), strict=True)
    if max(top - bottom for bottom, top in zip(low, high, strict=True)) < _BLANK_LEVELS:
        return "black" if max(high) < 8 else "blank"
    return ""


def thumbnail(image: Image.Image) -> bytes:
    """What duplicates and diversity are measured on."""
    return image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()


def distance(first: bytes, second: bytes) -> float:
    """RMS difference of two thumbnails in levels of 0-255; NaN where one is unknown."""
    if not first or not second:
        return math.nan
    a, b = (np.frombuffer(data, dtype=np.uint8).astype(np.float64) for data in (first, second))
    return float(np.sqrt(np.mean((a - b) ** 2)))


def mark_duplicates(candidates: Sequence[Candidate], nearest: float) -> list[Candidate]:
    """The candidates of a prompt, each one that repeats an earlier usable one marked.

    Args:
        candidates: in order.
        nearest: pictures closer than this are duplicates; 0 finds none but those with the same bytes.
    """
    result: list[Candidate] = []
    for candidate in candidates:
        if not candidate.problem:
            for number, earlier in enumerate(result):
                same = candidate.data == earlier.data or distance(candidate.thumbnail, earlier.thumbnail) < nearest
                if same and not earlier.problem:
                    candidate = replace(candidate, problem=f"duplicate of candidate {number}")
                    break
        result.append(candidate)
    return result

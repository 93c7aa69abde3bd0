"""Graders: what turns a picture and a benchmark's entry into right and wrong answers.

A grader answers every point of an entry with 1 or 0, or the whole picture with None when no answer can be had. Its
results go to :mod:`diffalign.evaluation.tasks`; their mean is the picture's score.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reward_models.base import source_hash

from ..errors import ConfigError, DataError
from .prompt_sets import Point

CONFIDENCE = {"counting": 0.9}  # GenEval: detections below it do not count ...
_CONFIDENCE = 0.3  # ... of all other tasks
_MOST = 16  # detections of one class that are looked at
_CLEAR = 0.1  # share of both boxes' sizes by which centres must differ
GENEVAL_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


@runtime_checkable
class Grader(Protocol):
    """Answers the points of benchmark entries."""

    @property
    def name(self) -> str:
        """Name of its score."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for answers to be comparable, with ``code_version``."""
        ...

    def dimensions(self, item: Any) -> list[str]:
        """The dimension of each point of an entry."""
        ...

    def grade(self, images: Sequence[Image.Image], items: Sequence[Any]) -> list[list[float] | None]:
        """For each RGB picture 1 or 0 for each point of its entry; None is missing."""
        ...


@dataclass(frozen=True)
class Detection:
    """One thing found in a picture.

    Args:
        label: its class, in GenEval's words.
        confidence: in [0, 1].
        box: left, top, right, bottom in pixels.
        mask: (H, W) bool, True on the thing; None when the detector gives none.
        color: its colour when the detector tells it.
    """

    label: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_] | None = None
    color: str | None = None


class Detector(Protocol):
    """Finds things in a picture. One that also names ``labels`` is refused entries of other classes."""

    def __call__(self, image: Image.Image) -> Sequence[Detection] | None:
        """All things found, in any order and with low confidence too; None when the picture cannot be judged."""
        ...


def load_grader(name: str, prompts: str, *, device: str | None = None) -> Grader:
    """A grader by name, for a prompt set.

    Args:
        name: ``mask2former`` (GenEval), ``URL#MODEL`` of an OpenAI-compatible server (UniGenBench), or
            ``package.module:name`` of a detector, a point judge or a :class:`Grader`, or of its class.
        prompts: name of the prompt set: ``geneval:...`` or ``unigenbench:...``.
        device: where a detector runs.

    Raises:
        ConfigError: the set has no grader, or there is no grader of that name.
    """
    benchmark = prompts.partition(":")[0]
    if benchmark not in ("geneval", "unigenbench"):
        raise ConfigError(
            f"a grader answers the entries of geneval:FILE or unigenbench:FILE, got the prompts {prompts}."
        )
    from . import judges  # late: it brings transformers and open_clip

    if benchmark == "geneval" and name == "mask2former":
        return GenEvalGrader(judges.Mask2FormerDetector(device=device), judges.ClipColors(device=device))
    if benchmark == "unigenbench" and name.startswith(("http://", "https://")):
        address, _, model = name.partition("#")
        if not model:
            raise ConfigError(f"expected URL#MODEL with the model's name on the server, got {name!r}.")
        return UniGenBenchGrader(judges.ServerPointJudge(address, model))
    found = import_path(name)
    part = found() if isinstance(found, type) else found
    if isinstance(part, Grader):
        return part
    if not callable(part):
        raise ConfigError(f"the grader {name!r} is neither a Grader nor can be called.")
    return GenEvalGrader(part) if benchmark == "geneval" else UniGenBenchGrader(part)


def import_path(path: str) -> Any:
    """The object that ``package.module:name`` means.

    Raises:
        ConfigError: there is none.
    """
    module, colon, name = path.partition(":")
    if not colon:
        raise ConfigError(f"there is no {path!r}; your own is named as package.module:name.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import {path!r}: {error}.") from error


#: From a picture, detections of one class and the class's name to the colour of each, one of GENEVAL_COLORS.
ColorNamer = Callable[[Image.Image, Sequence[Detection], str], Sequence[str]]


class GenEvalGrader:
    """GenEval (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513): one point a picture, right or wrong.

    Args:
        detector: finds things; see :class:`Detector`.
        colors: names colours; None takes those the detector tells.
        name: of its score.
    """

    def __init__(self, detector: Detector, colors: ColorNamer | None = None, name: str = "geneval") -> None:
        self.detector, self.colors, self.name = detector, colors, name

    @property
    def identity(self) -> dict[str, Any]:
        parts = [_identity_of(part) for part in (self.detector, self.colors) if part is not None]
        known = all(part.get("code_version") for part in parts)
        return {"id": self.name, "parts": parts, "code_version": source_hash(type(self), is_right) if known else None}

    def dimensions(self, item: dict[str, Any]) -> list[str]:
        return [str(item["tag"])]

    def grade(self, images: Sequence[Image.Image], items: Sequence[dict[str, Any]]) -> list[list[float] | None]:
        result: list[list[float] | None] = []
        for image, item in zip(images, items, strict=True):
            self._refuse_unknown(item)
            found = self.detector(image)
            result.append(None if found is None else [float(is_right(item, found, image, self.colors))])
        return result

    def _refuse_unknown(self, item: dict[str, Any]) -> None:
        labels = getattr(self.detector, "labels", None)
        for part in (*item.get("include", []), *item.get("exclude", [])):
            if labels is not None and part["class"] not in labels:
                raise ConfigError(
                    f"the detector does not know {part['class']!r}, so the entry {item['prompt']!r} cannot be judged; "
                    "take one that knows all classes."
                )


def is_right(
    item: dict[str, Any], found: Sequence[Detection], image: Image.Image, colors: ColorNamer | None = None
) -> bool:
    """GenEval's rule: everything in ``include`` is there, and nothing in ``exclude``.

    Args:
        item: ``tag``, ``include`` and perhaps ``exclude``, each a list of ``class``, ``count`` and perhaps ``color``
            and ``position: [relation, number of an earlier include]``.
        found: all detections.
        image: the picture, for ``colors``.
        colors: names colours; None takes those of the detections.
    """
    limit = CONFIDENCE.get(str(item["tag"]), _CONFIDENCE)
    sure = sorted((d for d in found if d.confidence > limit), key=lambda d: -d.confidence)
    by_class: dict[str, list[Detection]] = {}
    for detection in sure:
        by_class.setdefault(detection.label, []).append(detection)
    groups: list[list[Detection]] = []
    for part in item.get("include", []):
        group = by_class.get(part["class"], [])[:_MOST][: part["count"]]  # the surest ones are looked at
        if len(group) < part["count"]:
            return False
        if "color" in part and not _has_color(group, part, image, colors):
            return False
        if "position" in part:
            relation, target = part["position"]
            if not all(relation in relations(one, other) for one in group for other in groups[target]):
                return False
        groups.append(group)
    excluded = item.get("exclude", [])
    return all(len(by_class.get(part["class"], [])[:_MOST]) < part["count"] for part in excluded)


def relations(one: Detection, other: Detection) -> set[str]:
    """Where ``one`` lies seen from ``other``: of left of, right of, above, below; none where the boxes lie too near."""
    a, b = np.array(one.box, dtype=float).reshape(2, 2), np.array(other.box, dtype=float).reshape(2, 2)
    offset = a.mean(0) - b.mean(0)
    clear = np.maximum(np.abs(offset) - _CLEAR * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0) * np.sign(offset)
    if not clear.any():
        return set()
    x, y = clear / np.linalg.norm(offset)
    names = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in names.items() if holds}


#: From N pictures, their prompts and the points to check to N answers as text; None where there is none.
PointJudge = Callable[[Sequence[Image.Image], Sequence[str], Sequence[Sequence[Point]]], Sequence[str | None]]


class UniGenBenchGrader:
    """UniGenBench (Wang et al. 2025, https://arxiv.org/abs/2508.18701): a judge answers each test point of a prompt.

    Args:
        judge: see :data:`PointJudge`; an answer holds ``<score>[1, 0, ...]</score>``.
        name: of its score.
    """

    def __init__(self, judge: PointJudge, name: str = "unigenbench") -> None:
        self.judge, self.name = judge, name

    @property
    def identity(self) -> dict[str, Any]:
        part = _identity_of(self.judge)
        code = source_hash(type(self), parse_points) if part.get("code_version") else None
        return {"id": self.name, "parts": [part], "code_version": code}

    def dimensions(self, item: tuple[str, Sequence[Point]]) -> list[str]:
        return [point.dimension for point in item[1]]

    def grade(self, images: Sequence[Image.Image], items: Sequence[Any]) -> list[list[float] | None]:
        answers = self.judge(images, [prompt for prompt, _ in items], [points for _, points in items])
        return [
            None if answer is None else parse_points(answer, len(points))
            for answer, (_, points) in zip(answers, items, strict=True)
        ]


def parse_points(answer: str, count: int) -> list[float] | None:
    """The list of the only ``<score>[...]</score>``; None unless it is ``count`` times 0 or 1."""
    blocks = re.findall(r"<score>(.*?)</score>", answer, flags=re.DOTALL)
    if len(blocks) != 1:
        return None
    try:
        values = ast.literal_eval(blocks[0].strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    right = all(type(value) in (int, float) and value in (0, 1) for value in values)
    return [float(value) for value in values] if right else None


def _has_color(group: Sequence[Detection], part: dict[str, Any], image: Image.Image, colors: ColorNamer | None) -> bool:
    named = [d.color for d in group] if colors is None else list(colors(image, group, part["class"]))
    if None in named:
        raise DataError("the detector tells no colours; give GenEvalGrader a function that names them.")
    return named.count(part["color"]) >= part["count"]


def _identity_of(part: Any) -> dict[str, Any]:
    own = getattr(part, "identity", None)
    if isinstance(own, dict):
        return own
    target = part if hasattr(part, "__qualname__") else type(part)
    return {"id": f"{target.__module__}:{target.__qualname__}", "code_version": source_hash(target)}

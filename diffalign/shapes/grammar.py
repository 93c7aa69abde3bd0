"""The language of the shapes world: captions, their meaning, and which combinations are held out.

A caption is made from a :class:`Caption` and can be parsed back to an equal one, so that the checker needs
nothing but the prompt string. What a caption does not mention (size, position, background) is free.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (40, 90, 214),
    "yellow": (240, 200, 30),
    "purple": (140, 60, 180),
    "orange": (245, 130, 30),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
POSITIONS: dict[str, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
COUNTS: dict[int, str] = {2: "two", 3: "three"}

#: Colour-shape combinations that no training caption or training picture contains.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "ring"),
        ("green", "triangle"),
        ("blue", "square"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("orange", "square"),
    }
)
ALL_THINGS: tuple[tuple[str, str], ...] = tuple((c, s) for c in COLORS for s in SHAPES)
SEEN: tuple[tuple[str, str], ...] = tuple(thing for thing in ALL_THINGS if thing not in HELD_OUT)


@dataclass(frozen=True)
class Caption:
    """What a caption claims.

    Args:
        kind: ``single``, ``pair`` or ``count``.
        things: (colour, shape) of each named thing: two for ``pair``, else one.
        number: how many things the picture holds.
        relation: where the first thing of a pair lies, seen from the second.
        position: where a single thing lies; None leaves it free.
        background: name of the background; None leaves it free.
    """

    kind: str
    things: tuple[tuple[str, str], ...]
    number: int = 1
    relation: str | None = None
    position: str | None = None
    background: str | None = None

    @property
    def held_out(self) -> bool:
        """True when it names a combination that training never shows."""
        return any(thing in HELD_OUT for thing in self.things)

    def __str__(self) -> str:
        names = [f"{color} {shape}" for color, shape in self.things]
        if self.kind == "single":
            text = f"a {names[0]}" if self.position is None else f"a {names[0]} {POSITIONS[self.position]}"
        elif self.kind == "pair":
            text = f"a {names[0]} {self.relation} a {names[1]}"
        else:
            plural = "crosses" if self.things[0][1] == "cross" else self.things[0][1] + "s"
            text = f"{COUNTS[self.number]} {self.things[0][0]} {plural}"
        # "an orange ..." reads better, but one article keeps every word of the world one token.
        return text if self.background is None else f"{text} on a {self.background} background"


_THING = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_TAIL = rf"(?: on a ({'|'.join(BACKGROUNDS)}) background)?"
_SINGLE = re.compile(rf"an? {_THING}(?: ({'|'.join(POSITIONS.values())}))?{_TAIL}")
_PAIR = re.compile(rf"an? {_THING} ({'|'.join(RELATIONS)}) an? {_THING}{_TAIL}")
_COUNT = re.compile(
    rf"({'|'.join(COUNTS.values())}) ({'|'.join(COLORS)}) (circles|squares|triangles|crosses|rings){_TAIL}"
)


def parse(prompt: str) -> Caption:
    """Read a caption back.

    Raises:
        ValueError: the text is not a sentence of this world.
    """
    text = " ".join(prompt.lower().strip().rstrip(".").split())
    if match := _SINGLE.fullmatch(text):
        color, shape, where, background = match.groups()
        position = next((name for name, words in POSITIONS.items() if words == where), None)
        return Caption("single", ((color, shape),), 1, None, position, background)
    if match := _PAIR.fullmatch(text):
        c1, s1, relation, c2, s2, background = match.groups()
        return Caption("pair", ((c1, s1), (c2, s2)), 2, relation, None, background)
    if match := _COUNT.fullmatch(text):
        word, color, plural, background = match.groups()
        shape = "cross" if plural == "crosses" else plural[:-1]
        number = next(n for n, name in COUNTS.items() if name == word)
        return Caption("count", ((color, shape),), number, None, None, background)
    raise ValueError(
        f"{prompt!r} is not a caption of the shapes world; expected for example 'a red circle on the left', "
        "'a red circle above a blue ring' or 'two green squares on a black background'."
    )


def sample_caption(
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    kinds: dict[str, float] | None = None,
) -> Caption:
    """Draw a caption.

    Args:
        rng: source of randomness.
        held_out: True draws captions that name at least one held-out combination, False draws none of those.
        kinds: weights of ``single``, ``pair`` and ``count``; equal when None.
    """
    weights = kinds or {"single": 1.0, "pair": 1.0, "count": 1.0}
    names = list(weights)
    p = np.array([weights[n] for n in names], dtype=np.float64)
    kind = str(rng.choice(names, p=p / p.sum()))
    background = str(rng.choice(list(BACKGROUNDS))) if rng.random() < 0.3 else None
    first = _sample_thing(rng, held_out)
    if kind == "single":
        position = str(rng.choice(list(POSITIONS))) if rng.random() < 0.75 else None
        return Caption("single", (first,), 1, None, position, background)
    if kind == "count":
        return Caption("count", (first,), int(rng.choice(list(COUNTS))), None, None, background)
    second = first
    while second == first:
        second = _sample_thing(rng, held_out and bool(rng.random() < 0.5))
    things = (first, second) if rng.random() < 0.5 else (second, first)
    return Caption("pair", things, 2, str(rng.choice(RELATIONS)), None, background)


def sample_captions(count: int, seed: int, *, held_out: bool = False, unique: bool = True) -> list[str]:
    """Draw ``count`` caption strings, without repeats unless ``unique`` is False."""
    rng = np.random.default_rng(seed)
    captions: dict[str, None] = {}
    result: list[str] = []
    for _ in range(100 * count):
        text = str(sample_caption(rng, held_out=held_out))
        if unique and text in captions:
            continue
        captions[text] = None
        result.append(text)
        if len(result) == count:
            return result
    raise ValueError(f"the shapes world has fewer than {count} different captions of this kind; ask for fewer.")


def _sample_thing(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    pool = sorted(HELD_OUT) if held_out else SEEN
    return pool[int(rng.integers(len(pool)))]

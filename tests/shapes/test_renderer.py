"""Pictures of the shapes world."""

from __future__ import annotations

import numpy as np
import pytest

from diffalign.shapes.grammar import BACKGROUNDS, parse, sample_caption
from diffalign.shapes.renderer import SIZE, render


def draw(text: str, seed: int = 0) -> np.ndarray:
    return np.asarray(render(parse(text), np.random.default_rng(seed)))


def test_size_and_mode():
    image = render(parse("a red circle"), np.random.default_rng(0))
    assert image.size == (SIZE, SIZE) == (64, 64)
    assert image.mode == "RGB"


def test_a_seed_names_one_picture_and_seeds_differ():
    assert np.array_equal(draw("a red circle", 3), draw("a red circle", 3))
    assert not np.array_equal(draw("a red circle", 3), draw("a red circle", 4))


@pytest.mark.parametrize("name", list(BACKGROUNDS))
def test_the_named_background_is_drawn(name):
    corner = draw(f"a red circle in the center on a {name} background")[0, 0].astype(int)
    assert np.abs(corner - BACKGROUNDS[name]).max() <= 6


@pytest.mark.parametrize(
    ("where", "axis", "sign"),
    [("on the left", 1, -1), ("on the right", 1, 1), ("at the top", 0, -1), ("at the bottom", 0, 1)],
)
def test_the_named_position_is_drawn(where, axis, sign):
    for seed in range(20):
        image = draw(f"a blue circle {where} on a white background", seed).astype(int)
        inside = np.argwhere(np.abs(image - image[0, 0]).max(-1) > 60)
        assert sign * (inside.mean(0)[axis] - (SIZE - 1) / 2) > 8


def test_nothing_touches_the_border():
    rng = np.random.default_rng(1)
    for _ in range(300):
        image = np.asarray(render(sample_caption(rng), rng)).astype(int)
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert np.abs(border - image[0, 0]).max() == 0

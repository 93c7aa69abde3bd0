"""Reward models see what trainers see."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from diffalign.data.images import ORIENTATION
from diffalign.data.schema import PreferenceRow
from diffalign.errors import DataError
from diffalign.synthesis.candidates import Candidate, Row
from diffalign.synthesis.scoring import picture


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def transparent():
    return stored(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG")


def turned():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return stored(Image.new("RGB", (16, 32), (9, 90, 9)), "JPEG", exif=exif)


def of_16_bits():
    return stored(Image.fromarray(np.full((16, 16), 128 * 257, dtype=np.uint16)), "PNG")


@pytest.mark.parametrize(
    ("data", "size", "color"),
    [(transparent(), (16, 16), (255,) * 3), (turned(), (32, 16), None), (of_16_bits(), (16, 16), (128,) * 3)],
    ids=["transparent", "turned", "16 bits"],
)
def test_a_foreign_picture_is_judged_as_it_is_trained_on(data, size, color):
    seen = picture(Row("p", [Candidate("unknown", {}, data)]), 0)
    trained_on = PreferenceRow("p", [data, data], [1.0, 0.0], [1, 2]).images[0]
    assert seen.mode == "RGB" and seen.size == size and seen.tobytes() == trained_on.tobytes()
    assert color is None or seen.getpixel((8, 8)) == color


def test_what_is_no_picture_is_named_by_its_prompt():
    row = Row("a cat", [Candidate("unknown", {}, transparent()), Candidate("unknown", {}, b"garbage")])
    with pytest.raises(DataError, match=r"prompt 'a cat', images\[1\]: not a readable image"):
        picture(row, 1)

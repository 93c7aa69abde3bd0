"""Pictures of every kind become the same RGB image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models import RewardModelError, to_pil
from reward_models.images import _PLAIN_MODES


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def test_every_form_of_a_picture_gives_the_same_pixels(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "a.png")
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [
        Image.fromarray(pixels),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        pixels,
        pixels / 255.0,
        chw,
        chw / 255,
    ]
    for image in to_pil(forms):
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(np.asarray(to_pil((chw / 127.5 - 1)[None], pixel_range=(-1, 1))[0]), pixels)


def test_transparent_pixels_are_laid_on_white_and_gray_becomes_rgb():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_pil([clear])[0].getpixel((0, 0)) == (255, 255, 255)
    assert to_pil([np.full((2, 2), 7, np.uint8)])[0].getpixel((0, 0)) == (7, 7, 7)
    for mode in sorted(_PLAIN_MODES):
        assert to_pil([Image.new(mode, (2, 2))])[0].mode == "RGB"


def test_values_outside_the_stated_range_are_refused():
    for bad in (torch.full((3, 2, 2), -0.5), torch.full((3, 2, 2), 200.0), torch.full((3, 2, 2), float("nan"))):
        with pytest.raises(RewardModelError, match="pixel_range"):
            to_pil([bad])


@pytest.mark.parametrize(
    ("images", "word"),
    [
        (Image.new("RGB", (2, 2)), "list"),
        (torch.zeros(3, 2, 2), "4 dimensions"),
        ([torch.zeros(4, 2, 2)], "picture 0"),
        ([np.zeros((2, 2, 3), np.int64)], "uint8"),
        ([Image.new("I;16", (2, 2))], "I;16"),
        ([Image.new("La", (2, 2))], "La"),
        ([Image.new("RGB", (0, 2))], "0 x 2"),
        ([3], "int"),
        (3, "batch"),
    ],
)
def test_what_is_no_batch_of_pictures_is_refused(images, word):
    with pytest.raises(RewardModelError, match=word):
        to_pil(images)


def test_an_unreadable_file_is_named_with_its_number(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(RewardModelError, match=r"picture 1: cannot read .*bad\.png"):
        to_pil([Image.new("RGB", (2, 2)), tmp_path / "bad.png"])
    with pytest.raises(RewardModelError, match="missing.png"):
        to_pil([tmp_path / "missing.png"])

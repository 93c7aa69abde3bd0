"""One shape and one crop for all images of a row; never a stretch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from diffalign.data.geometry import apply, buckets, plan, size_step
from diffalign.errors import ConfigError, DataError

from .conftest import picture

edges = st.integers(8, 700)
sizes = st.tuples(edges, edges)
positions = st.tuples(st.floats(0, 1), st.floats(0, 1))


def test_sdxl_gets_the_buckets_it_was_trained_on() -> None:
    shapes = buckets(1024, 32)
    wide = {
        512: [1856, 1920, 1984, 2048], 576: [1664, 1728, 1792], 640: [1536, 1600], 704: [1344, 1408, 1472],
        768: [1280, 1344], 832: [1152, 1216], 896: [1088, 1152], 960: [1024, 1088], 1024: [1024],
    }  # fmt: skip
    expected = {shape for short, longs in wide.items() for long in longs for shape in ((short, long), (long, short))}
    assert set(shapes) == expected


def test_the_micro_world_keeps_its_own_shape() -> None:
    assert plan([(64, 64), (64, 64)], 64, multiple=16).bucket == (64, 64)
    assert size_step(64, 16) == 16 and size_step(512, 64) == 64


def test_a_resolution_the_model_cannot_take_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 64 pixels.*got 500. The nearest is 512"):
        plan([(64, 64)], 500, multiple=64)


def test_an_image_below_a_latent_cell_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 3, images\[1\]: 7 x 900 pixels is smaller than one latent cell"):
        plan([(64, 64), (7, 900)], 64, multiple=16, cell=8, where="row 3")


@settings(max_examples=200)
@given(st.lists(sizes, min_size=1, max_size=4), positions, st.booleans())
def test_every_crop_lies_inside_and_is_scaled_alike_in_both_directions(
    row: list[tuple[int, int]], position: tuple[float, float], aspect_buckets: bool
) -> None:
    """Peers' slip 4: an image was stretched to another's shape."""
    geometry = plan(row, 128, multiple=16, aspect_buckets=aspect_buckets, crop_position=position)
    out_height, out_width = geometry.bucket
    for (height, width), place in zip(row, geometry.placements, strict=True):
        left, top, right, bottom = place.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        across, down = out_width / (right - left), out_height / (bottom - top)
        assert across == pytest.approx(down, rel=1e-9)
        assert min(place.top, place.left) >= 0
        assert place.top + out_height <= place.scaled[0] + 0.5 and place.left + out_width <= place.scaled[1] + 0.5


def test_the_bucket_is_nearest_to_the_mean_shape_of_the_row() -> None:
    tall, wide = (1216, 832), (832, 1216)
    assert plan([tall, tall], 1024, multiple=32).bucket == (1216, 832)
    assert plan([tall, wide], 1024, multiple=32).bucket == (1024, 1024)
    assert plan([tall, wide], 1024, multiple=32) == plan([tall, wide], 1024, multiple=32)
    assert plan([wide, wide], 1024, multiple=32, aspect_buckets=False).bucket == (1024, 1024)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("position", [(0.5, 0.5), (0.1, 0.9)])
def test_equal_images_stay_equal(flip: bool, position: tuple[float, float]) -> None:
    """Peers' slip 3: flip and crop were drawn anew for each image of a pair."""
    image = picture(1, 50, 90)
    geometry = plan([(50, 90), (50, 90)], 32, multiple=16, crop_position=position)
    first, second = (apply(image, place, geometry.bucket, flip=flip) for place in geometry.placements)
    assert torch.equal(first, second)


def test_a_circle_stays_a_circle_in_a_row_of_mixed_shapes() -> None:
    """Of an image that is far from the bucket's shape only the crop differs, not the proportions."""
    image = Image.new("RGB", (300, 100), "black")
    ImageDraw.Draw(image).ellipse((120, 20, 180, 80), fill="white")
    geometry = plan([(100, 100), (100, 300)], 128, multiple=16)
    pixels = apply(image, geometry.placements[1], geometry.bucket)[0] > 0
    height, width = int(pixels.any(1).sum()), int(pixels.any(0).sum())
    assert abs(height - width) <= 1 and height > 50


def test_pixels_are_in_minus_one_to_one_and_not_resampled_without_need() -> None:
    image = picture(2, 32, 32)
    geometry = plan([(32, 32)], 32, multiple=16)
    pixels = apply(image, geometry.placements[0], geometry.bucket)
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels, expected)
    extremes = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255]]] * 2, dtype=np.uint8))
    pixels = apply(extremes, plan([(2, 2)], 2, multiple=1).placements[0], (2, 2))
    assert pixels.min() == -1.0 and pixels.max() == 1.0


def test_a_flip_mirrors_the_pixels_of_the_same_crop() -> None:
    image = picture(3, 48, 96)
    geometry = plan([(48, 96)], 32, multiple=16, aspect_buckets=False, crop_position=(0.5, 0.2))
    plain = apply(image, geometry.placements[0], geometry.bucket)
    flipped = apply(image, geometry.placements[0], geometry.bucket, flip=True)
    assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


def test_size_ids_hold_each_images_own_size_and_crop_and_are_mirrored_by_a_flip() -> None:
    geometry = plan([(96, 200), (150, 64)], 64, multiple=16, aspect_buckets=False, crop_position=(0.25, 0.25))
    plain, flipped = geometry.size_ids(), geometry.size_ids(flip=True)
    assert plain.dtype == torch.float32
    # first: scaled by 2/3 to 64 x 133, 69 columns stick out, a quarter of them to the left of the crop
    assert plain[0].tolist() == [96, 200, 0, 17, 64, 64]
    assert flipped[0].tolist() == [96, 200, 0, 133 - 64 - 17, 64, 64]
    # second: 150 x 64 needs no scaling; 86 rows stick out
    assert plain[1].tolist() == [150, 64, 22, 0, 64, 64]
    assert flipped[1].tolist() == plain[1].tolist()


def test_size_ids_describe_what_the_flipped_crop_shows() -> None:
    """Cropping the mirrored image at the mirrored place gives the mirrored crop."""
    image = picture(4, 32, 80)
    geometry = plan([(32, 80)], 32, multiple=16, aspect_buckets=False, crop_position=(0.5, 0.1))
    left = int(geometry.size_ids(flip=True)[0, 3])
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).crop((left, 0, left + 32, 32))
    expected = torch.from_numpy(np.asarray(mirrored).copy()).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(apply(image, geometry.placements[0], (32, 32), flip=True), expected)


def test_large_sizes_are_exact() -> None:
    geometry = plan([(1023, 1537)], 1024, multiple=32)
    assert geometry.size_ids()[0, :2].tolist() == [1023.0, 1537.0]
    assert math.isclose(geometry.bucket[0] * geometry.bucket[1], 1024**2, rel_tol=0.1)

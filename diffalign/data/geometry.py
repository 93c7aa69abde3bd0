"""One shape and one crop for all images of a row: scaled alike in both directions, then cropped, never stretched.

The size ids follow SDXL (Podell et al. 2023, 2.2): original size, top left corner of the crop, target size, all as
(height, width); the corner is counted in pixels of the scaled image, from the left edge of what the model sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import ConfigError, DataError

Size = tuple[int, int]  # height, width
CENTRE = (0.5, 0.5)
MAX_ASPECT = 4.0  # longest bucket; thinner images are cropped to it
LEAST_AREA = 0.9  # of the square's; with 64 px steps at 1024 these two give SDXL's own list (appendix I)
STEPS_PER_EDGE = 16  # buckets differ by at least 1/16 of the edge (64 px at 1024), so that batches fill


@dataclass(frozen=True)
class Placement:
    """How one image comes to its crop.

    Args:
        original: its size.
        scaled: its size after scaling, rounded.
        top: rows of the scaled image above the crop.
        left: columns of the scaled image left of the crop.
        box: the crop in pixels of the original: left, top, right, bottom.
    """

    original: Size
    scaled: Size
    top: int
    left: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Geometry:
    """Shape and crops of a row.

    Args:
        bucket: height and width of what the model sees, in pixels.
        placements: one per image.
    """

    bucket: Size
    placements: tuple[Placement, ...]

    def size_ids(self, flip: bool = False) -> Tensor:
        """(k, 6) fp32: original height, width, crop top, left, target height, width. A flip mirrors the crop."""
        rows = []
        for place in self.placements:
            left = place.scaled[1] - self.bucket[1] - place.left if flip else place.left
            rows.append((*place.original, place.top, left, *self.bucket))
        return torch.tensor(rows, dtype=torch.float32)


def size_step(resolution: int, multiple: int) -> int:
    """Distance between bucket edges: a multiple of ``multiple`` that divides the resolution, about 1/16 of it.

    Raises:
        ConfigError: the resolution is no multiple of ``multiple``.
    """
    if resolution < multiple or resolution % multiple:
        near = max(multiple, round(resolution / multiple) * multiple)
        raise ConfigError(
            f"resolution: expected a multiple of {multiple} pixels (the model's latent cell x its downsampling), got "
            f"{resolution}. The nearest is {near}."
        )
    step = multiple * max(1, round(resolution / STEPS_PER_EDGE / multiple))
    return step if resolution % step == 0 else multiple


@lru_cache(maxsize=32)
def buckets(resolution: int, multiple: int) -> tuple[Size, ...]:
    """All shapes of 90 to 100 % of ``resolution`` squared pixels whose edges are multiples of :func:`size_step`.

    Args:
        resolution: edge of the square one.
        multiple: pixels that every edge must be a multiple of.

    Returns:
        (height, width), from the tallest to the widest, mirrored pairs included; aspect at most 4.
    """
    step = size_step(resolution, multiple)
    area = resolution**2
    shapes = {
        shape
        for short in range(step, resolution + 1, step)
        for long in range(short, int(MAX_ASPECT * short) + 1, step)
        if LEAST_AREA * area <= short * long <= area
        for shape in ((short, long), (long, short))
    }
    return tuple(sorted(shapes, key=lambda shape: shape[1] / shape[0]))


def plan(
    sizes: Sequence[Size],
    resolution: int,
    *,
    multiple: int,
    aspect_buckets: bool = True,
    crop_position: tuple[float, float] = CENTRE,
    cell: int = 1,
    where: str = "the row",
) -> Geometry:
    """Choose the bucket and crops of a row's images.

    Each image is scaled, alike in both directions, until it covers the bucket; what sticks out is cropped at the same
    relative place in all of them. Images of one size thus get one crop.

    Args:
        sizes: (height, width) of each image.
        resolution: edge of the square bucket in pixels.
        multiple: pixels that every edge of a bucket must be a multiple of.
        aspect_buckets: take the bucket nearest to the mean log aspect of the images, else the square.
        crop_position: share of what sticks out that is cut above, and on the left; 1/2 is the centre.
        cell: pixels of a latent cell; smaller images are refused.
        where: named in the error.

    Raises:
        DataError: an image is smaller than a latent cell.
        ConfigError: the resolution does not fit the model.
    """
    for index, (height, width) in enumerate(sizes):
        if min(height, width) < cell:
            raise DataError(
                f"{where}, images[{index}]: {height} x {width} pixels is smaller than one latent cell of {cell} x "
                f"{cell}. Remove the row."
            )
    size_step(resolution, multiple)
    bucket = (resolution, resolution)
    if aspect_buckets:
        aspect = sum(math.log(width / height) for height, width in sizes) / len(sizes)
        bucket = min(
            buckets(resolution, multiple), key=lambda shape: (abs(math.log(shape[1] / shape[0]) - aspect), shape)
        )
    return Geometry(bucket, tuple(_place(size, bucket, crop_position) for size in sizes))


def _place(size: Size, bucket: Size, position: tuple[float, float]) -> Placement:
    (height, width), (out_height, out_width) = size, bucket
    scale = max(out_height / height, out_width / width)
    spare = (max(0.0, height * scale - out_height), max(0.0, width * scale - out_width))
    # whole pixels of the scaled image, so that the size ids tell the place exactly; never beyond the edge
    top, left = (
        min(math.floor(room * share + 0.5), math.floor(room + 1e-6))
        for room, share in zip(spare, position, strict=True)
    )
    box = (
        left / scale,
        top / scale,
        min(width, (left + out_width) / scale),
        min(height, (top + out_height) / scale),
    )
    return Placement(size, (round(height * scale), round(width * scale)), top, left, box)


def apply(image: Image.Image, place: Placement, bucket: Size, *, flip: bool = False) -> Tensor:
    """Scale and crop an RGB image (Lanczos, on the box itself, so that rounding cannot stretch it).

    Args:
        image: of size ``place.original``.
        place: its placement.
        bucket: height and width to come out.
        flip: mirror left and right.

    Returns:
        (3, height, width) fp32 in [-1, 1].
    """
    if (image.height, image.width) != place.original:
        raise ValueError(f"expected an image of {place.original} (height, width), got {(image.height, image.width)}")
    height, width = bucket
    picture = image.resize((width, height), Image.Resampling.LANCZOS, box=place.box)
    if flip:
        picture = ImageOps.mirror(picture)
    pixels = torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)
    return pixels.to(torch.float32) / 127.5 - 1.0

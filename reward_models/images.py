"""One place where pictures of any kind become 8-bit RGB ``PIL`` images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import RewardModelError

_PLAIN_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


def to_pil(images: Any, *, pixel_range: tuple[float, float] = (0.0, 1.0), first: int = 0) -> list[Image.Image]:
    """Read a batch of pictures.

    Args:
        images: a list whose items are PIL images, paths, arrays (H, W, 3) or (H, W), or tensors (3, H, W) or (1, H, W);
            or one array (N, H, W, 3) or tensor (N, 3, H, W). Transparent pixels are laid on white, EXIF rotation of
            files is applied.
        pixel_range: the values of black and white in floating-point arrays and tensors; ``(-1, 1)`` is what a VAE
            speaks. Integer arrays must be uint8 in [0, 255].
        first: number of the first picture, by which error messages name it.

    Returns:
        N RGB images; floating-point values are rounded to the nearest of 256 levels.

    Raises:
        RewardModelError: one picture where a batch is needed, an unreadable file, values outside the range, or a shape
            that is no picture. The message names the picture by its number.
    """
    if isinstance(images, (str, Path, Image.Image)):
        raise RewardModelError("expected a batch of pictures, got one; put it in a list: [image].")
    if isinstance(images, (torch.Tensor, np.ndarray)) and images.ndim != 4:
        raise RewardModelError(f"a batch of pictures has 4 dimensions, got shape {tuple(images.shape)}; add [None].")
    if not isinstance(images, Iterable):
        raise RewardModelError(f"expected a batch of pictures, got {type(images).__name__}.")
    return [_read(image, index, pixel_range) for index, image in enumerate(images, first)]


def _read(image: Any, index: int, pixel_range: tuple[float, float]) -> Image.Image:
    if isinstance(image, Image.Image):
        return _rgb(image, index)
    if isinstance(image, (str, Path)):
        return _open(Path(image), index)
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            shape = tuple(image.shape)
            raise RewardModelError(f"picture {index}: a tensor must be (3, H, W) or (1, H, W), got {shape}.")
        values = image.detach().cpu()
        values = values.float() if values.is_floating_point() else values  # numpy knows no bfloat16
        return _from_array(values.permute(1, 2, 0).numpy(), index, pixel_range)
    if isinstance(image, np.ndarray):
        return _from_array(image, index, pixel_range)
    raise RewardModelError(f"picture {index}: expected a PIL image, path, array or tensor, got {type(image).__name__}.")


def _open(path: Path, index: int) -> Image.Image:
    try:
        with Image.open(path) as file:
            return _rgb(ImageOps.exif_transpose(file), index)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise RewardModelError(f"picture {index}: cannot read {path}: {error}") from error


def _rgb(image: Image.Image, index: int) -> Image.Image:
    if image.mode not in _PLAIN_MODES:
        raise RewardModelError(f"picture {index}: PIL mode {image.mode!r} has no fixed range; convert it to RGB first.")
    if 0 in image.size:
        raise RewardModelError(f"picture {index}: it has {image.width} x {image.height} pixels.")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray, index: int, pixel_range: tuple[float, float]) -> Image.Image:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise RewardModelError(f"picture {index}: an array must be (H, W, 3) or (H, W), got {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        array = _quantise(array, index, pixel_range)
    elif array.dtype != np.uint8:
        raise RewardModelError(f"picture {index}: integer pictures must be uint8, got {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3))))


def _quantise(array: np.ndarray, index: int, pixel_range: tuple[float, float]) -> np.ndarray:
    low, high = pixel_range
    slack = 1e-3 * (high - low)  # rounding of half precision
    smallest, largest = float(array.min()), float(array.max())  # NaN fails the comparison below
    if not (smallest >= low - slack and largest <= high + slack):
        raise RewardModelError(
            f"picture {index}: values lie in [{smallest:g}, {largest:g}], expected [{low:g}, {high:g}]; "
            "state their range with to_pil(images, pixel_range=(low, high))."
        )
    unit = (array.astype(np.float64) - low) / (high - low)
    return np.rint(unit.clip(0, 1) * 255).astype(np.uint8)

"""The range of pixels, checked where they enter the VAE: a wrong range trains a wrong model without any error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DataError

_SLACK = 1e-3  # resizing filters and half precision may step over the edge by this much


def check_pixels(pixels: Tensor, multiple: int) -> None:
    """Refuse what is no batch of images in [-1, 1].

    A picture in [0, 1] is also one in [-1, 1], only pale, and an all-white one is legal. It is told apart by its
    grid: 8-bit values k become k / 255 in [0, 1] and k / 127.5 - 1 in [-1, 1]. Images that were resized after scaling
    lie on neither grid and pass.

    Args:
        pixels: (N, 3, H, W).
        multiple: H and W must be multiples of this.

    Raises:
        DataError: wrong shape or dtype, NaN, values outside [-1, 1], or 8-bit images scaled to [0, 1].
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise DataError(f"pixels must have shape (N, 3, H, W); got {tuple(pixels.shape)}.")
    if pixels.shape[2] % multiple or pixels.shape[3] % multiple or 0 in pixels.shape:
        raise DataError(f"image sides must be positive multiples of {multiple}; got {tuple(pixels.shape[2:])}.")
    if not pixels.is_floating_point():
        raise DataError(f"pixels must be floating point in [-1, 1]; got {pixels.dtype}. Use x / 127.5 - 1.")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1 - _SLACK and high <= 1 + _SLACK):  # also false for NaN
        advice = "x / 127.5 - 1" if high > 2 else "2 * x - 1 if they are in [0, 1]; clamp if they were resized"
        raise DataError(f"pixels must lie in [-1, 1]; got {low:.3g} to {high:.3g}. Use {advice}.")
    if low >= 0 and _on_grid(pixels, 255.0, 0.0) and not _on_grid(pixels, 127.5, 1.0):
        raise DataError(
            f"pixels must be scaled to [-1, 1]; these 8-bit images are in [0, 1] ({low:.3g} to {high:.3g}). "
            "Use 2 * x - 1."
        )


def _on_grid(pixels: Tensor, scale: float, shift: float) -> bool:
    """Whether every (pixel + shift) * scale is a whole number."""
    steps = (pixels.to(torch.float64) + shift) * scale
    return bool(((steps - steps.round()).abs() < 0.02).all())

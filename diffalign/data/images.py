"""Pictures as bytes: reading them from what a table holds, their size, their hash, and decoding."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ..errors import DataError

ORIENTATION = 0x0112  # the EXIF tag of cameras that store a turned picture


def image_bytes_of(value: Any, where: str) -> bytes:
    """The encoded bytes of one image cell.

    Args:
        value: bytes, a PIL image (stored as PNG), a path, or `datasets`' ``{"bytes": ..., "path": ...}``.
        where: named in the error, for example ``row 3, images[1]``.

    Raises:
        DataError: the cell is empty, its file is missing, or it is none of these.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray, memoryview)) and len(value):
        return bytes(value)
    if isinstance(value, Image.Image):
        buffer = io.BytesIO()
        value.save(buffer, format="PNG")
        return buffer.getvalue()
    if isinstance(value, (str, Path)) and str(value):
        return read_file(Path(value), where)
    came = "nothing" if value is None or (isinstance(value, (bytes, str)) and not value) else type(value).__name__
    raise DataError(
        f"{where}: expected an image (bytes, a file, or a PIL image), got {came}. Remove or repair the row."
    )


def read_file(path: Path, where: str) -> bytes:
    """Bytes of an image file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{where}: cannot read the image file {path} ({error.strerror}). Check the path.") from error


def content_hash(data: bytes) -> str:
    """128-bit hash of bytes, as 32 hex digits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _open(data: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # Pillow's decoders raise many types; each means that this is no picture
        raise DataError(
            f"{where}: not a readable image ({len(data)} bytes starting with {data[:8]!r}). Remove or repair the row."
        ) from error


def image_suffix(data: bytes, where: str) -> str:
    """Suffix of a file of these bytes, read from their header alone: ``png``, ``jpg``, ``webp``, ..."""
    with _open(data, where) as image:
        return {"JPEG": "jpg"}.get(str(image.format), str(image.format).lower())


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """(height, width) in pixels as the picture is shown, read from its header alone."""
    with _open(data, where) as image:
        width, height = image.size
        turned = _orientation(image) >= 5
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    """How a camera turned the picture, 1 (not at all) to 8, from the header alone.

    Pillow would decode a whole PNG to look for it behind the pixels, where hardly anyone writes it.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, OSError):  # a broken tag: the picture itself may be fine
        return 1


def decode_image(data: bytes, where: str) -> Image.Image:
    """The picture in RGB: turned as its EXIF says, and transparent parts over white.

    Raises:
        DataError: the bytes are no image, or are cut short.
    """
    image = _open(data, where)
    try:
        if _orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        if image.mode.startswith("I"):  # 16-bit greys, which Pillow would clip to white
            image = Image.fromarray((np.asarray(image, dtype=np.uint32) // 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:
        raise DataError(f"{where}: the image is damaged ({error}). Remove or repair the row.") from error

"""How pictures look, whatever their prompt says: what reward hacking changes first.

Sharpness, saturation, contrast and brightness of each picture, variety among the pictures of one prompt, and how far
a picture moved from the base's picture of the same noise. None of it is good or bad by itself: read it beside scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import ndimage

from reward_models import load_reward_model

from ..errors import ConfigError
from .graders import import_path
from .pictures import Picture, open_picture

MEASURES = {
    "sharpness": "standard deviation of the luminance's Laplacian",
    "saturation": "mean of (max - min) / max of a pixel's RGB",
    "contrast": "standard deviation of luminance",
    "brightness": "mean luminance",
}
DIVERSITY = "diversity"

_PIXEL_SIDE = 32
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])  # Rec. 709

#: From N RGB pictures to (N, d) vectors that are compared by their cosine.
Embedding = Callable[[list[Image.Image]], ArrayLike]


def load_embedding(name: str) -> Embedding | None:
    """``pixels`` (None: no embedding, small pictures are compared directly), ``clip``, or ``package.module:function``.

    Raises:
        ConfigError: there is no such embedding.
    """
    if name == "pixels":
        return None
    if name == "clip":
        return clip_embedding(load_reward_model("clip"))
    if ":" not in name:
        raise ConfigError(f"the embedding is pixels, clip or package.module:function, got {name!r}.")
    found = import_path(name)
    if not callable(found):
        raise ConfigError(f"the embedding {name!r} is no function from a list of pictures to (N, d) vectors.")
    return found


def clip_embedding(scorer: Any) -> Embedding:
    """The image tower of a loaded :class:`reward_models.clip.ClipScore`, with any open_clip model."""
    import torch

    @torch.inference_mode()
    def embed(images: list[Image.Image]) -> NDArray[np.float32]:
        pixels = torch.stack([scorer.preprocess(image) for image in images])
        seen = [scorer.model.encode_image(p.to(scorer.device, scorer.dtype)) for p in pixels.split(scorer.batch_size)]
        return torch.cat(seen).float().cpu().numpy()

    return embed


def measure(picture: Picture) -> dict[str, float]:
    """The four numbers of one picture, each for values in [0, 1]."""
    pixels = np.asarray(open_picture(picture), dtype=np.float64) / 255
    luminance = pixels @ _LUMINANCE
    highest, lowest = pixels.max(-1), pixels.min(-1)
    saturation = np.divide(highest - lowest, highest, out=np.zeros_like(highest), where=highest > 0)
    return {
        "sharpness": float(ndimage.laplace(luminance, mode="nearest").std()),
        "saturation": float(saturation.mean()),
        "contrast": float(luminance.std()),
        "brightness": float(luminance.mean()),
    }


def embed(pictures: Sequence[Picture], embedding: Embedding | None, *, at_once: int = 64) -> NDArray[np.float64]:
    """(N, d) vectors whose distances :func:`distance` takes.

    Without an embedding a picture is its own 32 x 32 pixels.
    """
    parts = []
    for start in range(0, len(pictures), at_once):
        images = [open_picture(picture) for picture in pictures[start : start + at_once]]
        if embedding is None:
            small = [image.resize((_PIXEL_SIDE, _PIXEL_SIDE), Image.Resampling.BOX) for image in images]
            vectors = np.stack([np.asarray(image, dtype=np.float64).reshape(-1) / 255 for image in small])
        else:
            vectors = np.asarray(embedding(images), dtype=np.float64)
            if vectors.ndim != 2 or len(vectors) != len(images):
                raise ConfigError(f"the embedding gave shape {vectors.shape} for {len(images)} pictures, not (N, d).")
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
        parts.append(vectors)
    return np.concatenate(parts)


def distance(first: NDArray[np.float64], second: NDArray[np.float64], *, cosine: bool) -> NDArray[np.float64]:
    """(N,): 1 - cosine of embeddings, or the root mean square difference of pixels; 0 for equal pictures."""
    if cosine:
        return np.maximum(1 - (first * second).sum(-1), 0.0)
    return np.sqrt(((first - second) ** 2).mean(-1))


def diversity(vectors: NDArray[np.float64], seeds: int, *, cosine: bool) -> NDArray[np.float64]:
    """(P,) mean distance between two pictures of one prompt; NaN with one seed.

    Args:
        vectors: (P * seeds, d), seeds running fastest.
        seeds: pictures of each prompt.
        cosine: whether the vectors are embeddings.
    """
    groups = vectors.reshape(-1, seeds, vectors.shape[-1])
    pairs = [(i, j) for i in range(seeds) for j in range(i)]
    if not pairs:
        return np.full(len(groups), np.nan)
    return np.mean([distance(groups[:, i], groups[:, j], cosine=cosine) for i, j in pairs], axis=0)

"""From RGB pictures to the pixels a network was trained on.

Three ways are in use, and they differ by a pixel or more on odd sizes: torchvision's (OpenAI CLIP, ImageReward),
transformers' (PickScore, MPS) and HPSv2's own letterbox. Each model uses the one its makers used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Preprocess = Callable[[Image.Image], Tensor]


def shortest_side_crop(size: int) -> Preprocess:
    """OpenAI CLIP's: shortest side to ``size`` (bicubic, by PIL), centre crop, CLIP's mean and std. (3, size, size)"""
    bicubic = InterpolationMode.BICUBIC
    return Compose([Resize(size, bicubic), CenterCrop(size), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])


def letterbox(size: int, *, antialias: bool) -> Preprocess:
    """HPSv2's: longest side to ``size`` (bicubic, on the tensor), black borders, CLIP's mean and std. (3, size, size)

    Two details that change scores are those of the original. Borders are black before normalisation, not zero after
    it. A picture whose longest side already equals ``size`` is neither resized nor, there, padded; as an unpadded
    picture that is not square cannot be batched, it is padded here.
    """
    normalise = Normalize(CLIP_MEAN, CLIP_STD)

    def preprocess(image: Image.Image) -> Tensor:
        pixels = TF.to_tensor(image)
        height, width = pixels.shape[1:]
        scale = size / max(height, width)
        if scale != 1.0:
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
            pixels = TF.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=antialias)
        top, left = (size - height) // 2, (size - width) // 2
        return normalise(TF.pad(pixels, [left, top, size - width - left, size - height - top]))

    return preprocess


def stack(preprocess: Preprocess, images: list[Image.Image], device: str, dtype: torch.dtype) -> Tensor:
    """(n, 3, H, W) on ``device``; the arithmetic before it is fp32 on the CPU."""
    return torch.stack([preprocess(image) for image in images]).to(device, dtype)

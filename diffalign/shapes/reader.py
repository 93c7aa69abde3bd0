"""A learned reader of the shapes world: a small detector that has seen drawn pictures only, never the checker.

The checker explains pixels by rules; this network learned from pictures whose content is known because they were drawn
from it. What the two agree on is no fault of either. Captions are held against what was read by the same logic.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from reward_models.base import BaseRewardModel, source_hash
from reward_models.errors import RewardModelError

from . import checker, grammar
from .checker import Thing
from .grammar import BACKGROUNDS, COLORS, SHAPES, parse
from .renderer import SIZE

STRIDE = 4
CELLS = SIZE // STRIDE
_CENTRE = 0.5  # probability from which a cell is the centre of a thing
_COLORS, _SHAPES, _BACKGROUNDS = list(COLORS), list(SHAPES), list(BACKGROUNDS)


def reader_folder() -> Path:
    """Folder of the embedded weights."""
    return Path(__file__).parent / "reader_weights"


class ReaderNet(nn.Module):
    """One prediction for each cell of 4 x 4 pixels, in the manner of CenterNet (Zhou et al. 2019, arXiv:1904.07850).

    The last class of colours and of shapes is "none of them": a thing of two colours, a thing that is no shape.
    """

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width // 2, 3, 1, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        )  # fmt: skip
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(8, width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1),
            )
            for _ in range(depth)
        )
        self.norm = nn.GroupNorm(8, width)
        self.heads = nn.ModuleDict(
            {
                "centre": nn.Conv2d(width, 1, 1),
                "box": nn.Conv2d(width, 3, 1),
                "color": nn.Conv2d(width, len(COLORS) + 1, 1),
                "shape": nn.Conv2d(width, len(SHAPES) + 1, 1),
            }
        )
        self.background = nn.Linear(width, len(BACKGROUNDS))

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """From pixels in [-1, 1], shape (B, 3, 64, 64).

        Returns:
            Logits (B, C, 16, 16) of ``centre``, ``color`` and ``shape``; ``box`` (B, 3, 16, 16), offset from the cell's
            middle and half-extent, in cells; logits (B, 3) of ``background``.
        """
        x = self.stem(pixels)
        for block in self.blocks:
            x = x + block(x)
        x = F.relu(self.norm(x))
        return {name: head(x) for name, head in self.heads.items()} | {"background": self.background(x.mean((2, 3)))}


def as_pixels(images: list[Image.Image]) -> Tensor:
    """(B, 3, 64, 64) in [-1, 1] from square pictures.

    Raises:
        ValueError: a picture is not square.
    """
    return torch.from_numpy(np.stack([checker.as_array(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def things_of(predicted: dict[str, Tensor]) -> list[tuple[str, list[Thing]]]:
    """Background and things of each picture, largest first, as the checker's ``read`` gives them.

    Args:
        predicted: what :class:`ReaderNet` returns, for B pictures.
    """
    centre = predicted["centre"].sigmoid()[:, 0]
    peaks = (centre > _CENTRE) & (centre == F.max_pool2d(centre[:, None], 3, 1, 1)[:, 0])
    color, shape = predicted["color"].argmax(1), predicted["shape"].argmax(1)
    found = []
    for n, background in enumerate(predicted["background"].argmax(1).tolist()):
        things = []
        for row, column in peaks[n].nonzero().tolist():
            dx, dy, half = predicted["box"][n, :, row, column].tolist()
            things.append(
                Thing(
                    [*_COLORS, None][int(color[n, row, column])],
                    [*_SHAPES, None][int(shape[n, row, column])],
                    (column + 0.5 + dx) * STRIDE,
                    (row + 0.5 + dy) * STRIDE,
                    half * STRIDE,
                )
            )
        found.append((_BACKGROUNDS[background], sorted(things, key=lambda thing: -thing.half)))
    return found


class ShapesReader(BaseRewardModel):
    """1.0 when every claim of the caption holds in what the network reads, else 0.0; NaN for prompts of another world.

    Args:
        folder: a reader written by ``training/train_shapes_reader.py``; the embedded one when None.
        device: where it runs; the CPU when None, where it is fast enough.
        batch_size: pictures read at once.
    """

    name = "shapes-reader"

    def __init__(self, folder: str | Path | None = None, *, device: str | None = None, batch_size: int = 64) -> None:
        weights = (Path(folder) if folder is not None else reader_folder()) / "model.safetensors"
        if not weights.is_file():
            raise RewardModelError(f"shapes-reader: expected {weights}; training/train_shapes_reader.py writes it.")
        self.device, self.batch_size = device or "cpu", batch_size
        self.model = ReaderNet().eval().requires_grad_(False)
        try:
            self.model.load_state_dict({name: tensor.float() for name, tensor in load_file(weights).items()})
        except (SafetensorError, RuntimeError, OSError) as error:
            raise RewardModelError(f"shapes-reader: cannot load {weights}: {error}") from error
        self.model.to(self.device)
        self._revision = hashlib.blake2b(weights.read_bytes(), digest_size=6).hexdigest()

    @property
    def identity(self) -> dict[str, str | None]:
        """The revision is the hash of the weights."""
        code = source_hash(grammar, checker, ReaderNet, as_pixels, things_of, type(self))
        return {"id": self.name, "revision": self._revision, "code_version": code}

    @torch.inference_mode()
    def read(self, images: list[Image.Image]) -> list[tuple[str, list[Thing]]]:
        """Background and things of each picture, as :func:`diffalign.shapes.checker.read` gives them."""
        predicted = self.model(as_pixels(images).to(self.device))
        return things_of({name: tensor.cpu() for name, tensor in predicted.items()})

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        scores = []
        for (background, things), prompt in zip(self.read(images), prompts, strict=True):
            try:
                scores.append(float(checker.judge(background, things, parse(prompt)).strict))
            except ValueError:  # another world's prompt: no judgement, which is not a bad score
                scores.append(math.nan)
        return scores

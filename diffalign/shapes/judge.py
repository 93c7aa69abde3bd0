"""The learned judge of the shapes world: a small open_clip model, trained on the checker's preferences.

It is to the checker what PickScore is to people: good, but wrong often enough that training on it can overfit it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reward_models.base import BaseRewardModel, source_hash
from reward_models.errors import RewardModelError

from .grammar import parse

_WEIGHTS = "open_clip_model.safetensors"


def judge_folder() -> Path:
    """Folder of the judge; open_clip loads it as ``local-dir:FOLDER``."""
    return Path(__file__).parent / "judge_weights"


class ShapesJudge(BaseRewardModel):
    """PickScore's formula: ``exp(logit scale) * cosine`` of picture and caption; NaN for prompts of another world.

    The difference of two pictures' scores is the logit of the first being preferred.

    Args:
        folder: a judge written by ``training/train_shapes_judge.py``; the embedded one when None.
        device: where it runs; the CPU when None, where it is fast enough.
        dtype: precision of the weights; embeddings are compared in fp32.
        batch_size: pictures scored at once.
    """

    name = "shapes-judge"

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        import open_clip

        self.folder = Path(folder) if folder is not None else judge_folder()
        weights = self.folder / _WEIGHTS
        if not weights.is_file():
            raise RewardModelError(f"shapes-judge: expected {weights}; training/train_shapes_judge.py writes it.")
        self.device, self.dtype, self.batch_size = device or "cpu", dtype, batch_size
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                f"local-dir:{self.folder}", device=self.device, weights_only=True
            )
            self.tokenizer = open_clip.get_tokenizer(f"local-dir:{self.folder}")
        except (RuntimeError, OSError, ValueError) as error:
            raise RewardModelError(f"shapes-judge: cannot load {self.folder}: {error}") from error
        self.scale = float(model.logit_scale.detach().exp())
        self.model = model.eval().requires_grad_(False).to(dtype)
        self._revision = hashlib.blake2b(weights.read_bytes(), digest_size=6).hexdigest()

    @property
    def identity(self) -> dict[str, str | None]:
        """The revision is the hash of the weights."""
        return {"id": self.name, "revision": self._revision, "code_version": source_hash(type(self))}

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> Tensor:
        """(n, d) fp32: unit embeddings of RGB pictures, as the score compares them; how far apart pictures are."""
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        seen = self.embed(images)
        told = F.normalize(self.model.encode_text(self.tokenizer(prompts).to(self.device)).float(), dim=-1)
        scores = self.scale * (seen * told).sum(-1)
        return torch.where(torch.tensor([_is_caption(prompt) for prompt in prompts]), scores.cpu(), math.nan)


def _is_caption(prompt: str) -> bool:
    try:
        parse(prompt)
    except ValueError:
        return False
    return True

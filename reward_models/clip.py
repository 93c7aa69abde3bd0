"""CLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718) with any model of open_clip."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .base import BaseRewardModel
from .errors import RewardModelError


class ClipScore(BaseRewardModel):
    """Agreement of picture and prompt: ``2.5 * max(cosine, 0)``, in [0, 2.5].

    Args:
        model: architecture name of open_clip, or ``hf-hub:owner/name``.
        tag: pretrained tag of open_clip, or the path of a checkpoint; None for ``hf-hub:`` models, which bring theirs.
        device: where it runs; the GPU when there is one.
        dtype: precision of the weights; embeddings are compared in fp32.
        cache_dir: folder of downloaded weights; None means the hub's own.
        batch_size: pictures scored at once.
    """

    name = "clip"
    weight = 2.5  # w of the paper, section 3

    def __init__(
        self,
        model: str = "ViT-B-32",
        tag: str | None = "laion2b_s34b_b79k",
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        cache_dir: str | Path | None = None,
        batch_size: int = 16,
    ) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise RewardModelError("the reward model 'clip' needs open_clip: pip install open_clip_torch") from error
        self.model_name, self.tag, self.batch_size = model, tag, batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        try:
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(
                model,
                pretrained=tag,
                device=self.device,
                cache_dir=str(cache_dir) if cache_dir else None,
                weights_only=True,
            )
            self.tokenizer = open_clip.get_tokenizer(model)
        except (RuntimeError, OSError, ValueError) as error:
            raise RewardModelError(f"open_clip cannot load {model!r} with weights {tag!r}: {error}") from error
        self.model.eval().requires_grad_(False).to(dtype)

    @property
    def identity(self) -> dict[str, str | None]:
        return {"id": self.model_name, "revision": self.tag, "code_version": f"open_clip {version('open_clip_torch')}"}

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device, self.dtype)
        seen = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        told = F.normalize(self.model.encode_text(self.tokenizer(prompts).to(self.device)).float(), dim=-1)
        return self.weight * (seen * told).sum(-1).clamp(min=0)

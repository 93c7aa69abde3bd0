"""PickScore (Kirstain et al. 2023, https://arxiv.org/abs/2305.01569)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .weights import WeightsRewardModel, load_pretrained

CHECKPOINT = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore(WeightsRewardModel):
    """``exp(logit_scale) * cosine`` of a CLIP ViT-H/14 tuned on Pick-a-Pic; about 17 to 25.

    ``softmax`` of the scores of one prompt's pictures is the probability that each is preferred.

    Args:
        checkpoint: hub id or folder of a ``CLIPModel``.
        processor: hub id or folder of its tokenizer and image processor; None means those in the checkpoint's folder
            where it is one that has them, else those of the CLIP it was tuned from.
        revision: revision of the checkpoint on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of the weights; embeddings are compared in fp32.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: the checkpoint cannot be found or lacks weights.
    """

    name = "pickscore"
    licence = "MIT (code); the weights' card states none"
    requires = ("transformers",)

    def __init__(
        self,
        checkpoint: str | Path = CHECKPOINT,
        processor: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        super().__init__(device, dtype, batch_size)
        if processor is None:
            processor = checkpoint if (Path(checkpoint) / "preprocessor_config.json").is_file() else PROCESSOR
        model = load_pretrained(CLIPModel, checkpoint, self.name, revision=revision, dtype=dtype)
        self.model = model.to(self.device)
        self.tokenizer = load_pretrained(AutoTokenizer, processor, self.name)
        self.preprocess = load_pretrained(CLIPImageProcessorPil, processor, self.name)
        self.tokens = self.model.config.text_config.max_position_embeddings
        self._identify(checkpoint, self.model, processor=str(processor))

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> Tensor:
        """(n, d) fp32: unit embeddings of RGB pictures, as the score compares them; how far apart pictures are."""
        pixels = self.preprocess(images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)
        return F.normalize(self.model.get_image_features(pixels).pooler_output.float(), dim=-1)

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        text = self.tokenizer(prompts, padding=True, truncation=True, max_length=self.tokens, return_tensors="pt")
        seen = self.embed(images)
        told = F.normalize(self.model.get_text_features(**text.to(self.device)).pooler_output.float(), dim=-1)
        return self.model.logit_scale.float().exp() * (seen * told).sum(-1)

"""CLIPScore (Hessel et al. 2021, https://arxiv.org/abs/2104.08718) with any model of open_clip."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import RewardModelError
from .preprocessing import stack
from .weights import WeightsRewardModel

PREFIX = "A photo depicts "  # put before every prompt by the paper's code


class ClipScore(WeightsRewardModel):
    """Agreement of picture and prompt: ``2.5 * max(cosine, 0)``, in [0, 2.5]; about 0.6 to 0.9.

    The paper's numbers are those of ``model="ViT-B-32", tag="openai"``. What training code calls "CLIP score" is often
    the bare cosine: ``cosine=True`` gives it, under the name ``clip-cosine`` so that the two never meet in one column.

    Args:
        model: architecture name of open_clip, or ``hf-hub:owner/name``.
        tag: pretrained tag of open_clip, or the path of a checkpoint; None for ``hf-hub:`` models, which bring theirs.
        prefix: put before every prompt.
        cosine: the bare cosine of picture and prompt, in [-1, 1], without the prefix.
        device: where it runs; the GPU when there is one.
        dtype: precision of the weights; embeddings are compared in fp32.
        cache_dir: folder of downloaded weights; None means the hub's own.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: open_clip has no such model or weights.
    """

    licence = "of the chosen weights: OpenAI's and LAION's MIT; DFN's for research only"
    requires = ("open_clip",)
    weight = 2.5  # w of the paper, section 3

    def __init__(
        self,
        model: str = "ViT-B-32",
        tag: str | None = "laion2b_s34b_b79k",
        *,
        prefix: str = PREFIX,
        cosine: bool = False,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        cache_dir: str | Path | None = None,
        batch_size: int = 16,
    ) -> None:
        import open_clip

        super().__init__(device, dtype, batch_size)
        self.name = "clip-cosine" if cosine else "clip"
        self.prefix, self.cosine = "" if cosine else prefix, cosine
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
        self._identify(model, self.model, tag=tag, prefix=self.prefix, cosine=cosine)

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> Tensor:
        """(n, d) fp32: unit embeddings of RGB pictures, as the score compares them; how far apart pictures are."""
        return F.normalize(
            self.model.encode_image(stack(self.preprocess, images, self.device, self.dtype)).float(), dim=-1
        )

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        words = self.tokenizer([self.prefix + prompt for prompt in prompts]).to(self.device)
        seen = self.embed(images)
        told = F.normalize(self.model.encode_text(words).float(), dim=-1)
        cosine = (seen * told).sum(-1)
        return cosine if self.cosine else self.weight * cosine.clamp(min=0)

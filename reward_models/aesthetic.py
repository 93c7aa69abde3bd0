"""LAION's aesthetic predictors: a linear reading of CLIP's picture embedding, blind to the prompt.

v2: https://github.com/christophschuhmann/improved-aesthetic-predictor; v1: https://github.com/LAION-AI/aesthetic-predictor
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import affine_head
from .errors import RewardModelError
from .preprocessing import shortest_side_crop, stack
from .weights import WeightsRewardModel, load_pretrained, read_state

CLIP = "openai/clip-vit-large-patch14"
HEADS = {
    "v1": "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    "v2": "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth",
}


class AestheticScore(WeightsRewardModel):
    """``w . e + b`` of the picture's unit embedding ``e``; about 1 to 10. The prompt changes nothing.

    Args:
        version: ``v2`` (trained on SAC, Logos and AVA) or ``v1`` (on SAC); the score is called ``aesthetic`` or
            ``aesthetic-v1``.
        head: file of the head; None downloads the official one.
        clip: hub id or folder of the CLIP whose embeddings the head reads; both official heads read OpenAI's ViT-L/14.
        revision: revision of ``clip`` on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of CLIP's weights; the head is fp32.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: no such version, a head of another kind, or one for embeddings of another width.
    """

    licence = "Apache-2.0 (v2 head), MIT (v1 head and CLIP)"
    requires = ("transformers",)

    def __init__(
        self,
        version: str = "v2",
        head: str | Path | None = None,
        clip: str | Path = CLIP,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        from transformers import CLIPModel

        super().__init__(device, dtype, batch_size)
        if version not in HEADS:
            raise RewardModelError(f"aesthetic: version must be one of {', '.join(HEADS)}, got {version!r}.")
        self.name = "aesthetic" if version == "v2" else "aesthetic-v1"
        state = read_state(_head_file(version, head))
        folded = affine_head.fold(state, self.name) if version == "v2" else affine_head.single(state, self.name)
        self.head = folded.to(self.device)
        model = load_pretrained(CLIPModel, clip, self.name, revision=revision, dtype=dtype)
        self.model = model.to(self.device)
        if self.model.config.projection_dim != self.head.in_features:
            raise RewardModelError(
                f"{self.name}: the head reads {self.head.in_features} numbers, {clip} gives "
                f"{self.model.config.projection_dim}; give the CLIP the head was trained on."
            )
        self.preprocess = shortest_side_crop(self.model.config.vision_config.image_size)
        self._identify(head or HEADS[version], self.model, self.head, clip=str(clip))

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = stack(self.preprocess, images, self.device, self.dtype)
        seen = F.normalize(self.model.get_image_features(pixels).pooler_output.float(), dim=-1)
        return self.head(seen)[:, 0]


def _head_file(version: str, head: str | Path | None) -> Path:
    if head is not None:
        if not Path(head).is_file():
            raise RewardModelError(f"aesthetic: there is no file {head}.")
        return Path(head)
    target = Path(torch.hub.get_dir()) / "checkpoints" / f"laion-aesthetic-{version}.pth"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(HEADS[version], str(target), progress=False)  # writes beside, then renames
        except OSError as error:
            raise RewardModelError(
                f"aesthetic: cannot download {HEADS[version]}: {error}. Offline, give a copy as head=PATH."
            ) from error
    return target

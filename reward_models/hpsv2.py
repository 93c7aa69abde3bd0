"""Human Preference Score v2.0 and v2.1 (Wu et al. 2023, https://arxiv.org/abs/2306.09341)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .errors import RewardModelError
from .preprocessing import letterbox, stack
from .weights import WeightsRewardModel, find_file, load_exactly, read_state

CHECKPOINT = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(WeightsRewardModel):
    """The bare cosine, without logit scale, of a CLIP ViT-H/14 tuned on HPD v2; about 0.2 to 0.35.

    Papers print 100 times this. Scores of v2.0 and v2.1 cannot be compared, so their names differ: ``hpsv2.0`` and
    ``hpsv2.1``.

    Args:
        version: ``v2.1`` or ``v2.0``.
        checkpoint: hub id, folder or file of the weights; a file is taken to be of ``version``.
        architecture: open_clip's name of the network.
        antialias: smooth pictures when shrinking them. The makers' torchvision did not (before 0.17 tensors were
            resized without it); their package under a current torchvision does.
        revision: revision of the checkpoint on the hub.
        device: where it runs; the GPU when there is one.
        dtype: precision of the weights; embeddings are compared in fp32.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: no such version, or weights that do not fit the architecture exactly.
    """

    licence = "Apache-2.0"
    requires = ("open_clip",)

    def __init__(
        self,
        version: str = "v2.1",
        checkpoint: str | Path = CHECKPOINT,
        architecture: str = "ViT-H-14",
        *,
        antialias: bool = False,
        revision: str | None = None,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ) -> None:
        import open_clip

        super().__init__(device, dtype, batch_size)
        if version not in FILES:
            raise RewardModelError(f"hpsv2: version must be one of {', '.join(FILES)}, got {version!r}.")
        self.name = f"hps{version}"
        config = open_clip.get_model_config(architecture)
        if config is None:
            raise RewardModelError(f"{self.name}: open_clip has no architecture {architecture!r}.")
        self.model = open_clip.CLIP(**config)
        self.tokenizer = open_clip.get_tokenizer(architecture)
        load_exactly(self.model, read_state(find_file(checkpoint, FILES[version], revision)), self.name)
        self.model.eval().requires_grad_(False).to(self.device, dtype)
        size = self.model.visual.image_size
        self.preprocess = letterbox(size[0] if isinstance(size, tuple) else size, antialias=antialias)
        self._identify(checkpoint, self.model, version=version, architecture=architecture, antialias=antialias)

    @torch.inference_mode()
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        pixels = stack(self.preprocess, images, self.device, self.dtype)
        seen = F.normalize(self.model.encode_image(pixels).float(), dim=-1)
        told = F.normalize(self.model.encode_text(self.tokenizer(prompts).to(self.device)).float(), dim=-1)
        return (seen * told).sum(-1)

"""VQAScore (Lin et al. 2024, https://arxiv.org/abs/2404.01291) with any vision-language model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .base import BaseRewardModel, source_hash
from .errors import RewardModelError
from .unified_reward.backend import Picture, Request
from .unified_reward.local import LocalBackend

PLACEHOLDER = "{prompt}"
_ANSWERS = ("Yes", "No")


class VQAScore(BaseRewardModel):
    """How likely the model answers "Yes" when asked whether the picture shows its prompt: in [0, 1].

    The probability is over all that the model could say, as in the paper, not over yes and no alone. Scores of
    different models or wordings are not comparable, and none is comparable with the paper's CLIP-FlanT5.

    Args:
        model: hub id or folder of a checkpoint that ``AutoModelForImageTextToText`` knows.
        question: what is asked; ``{prompt}`` stands for the prompt.
        device, dtype, revision, template_options: see :class:`~reward_models.unified_reward.LocalBackend`.
        batch_size: pictures scored at once.
    """

    name = "vqascore"
    requires = ("transformers",)

    def __init__(
        self,
        model: str | Path = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        question: str = 'Does this figure show "{prompt}"? Please answer Yes or No.',
        device: str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        template_options: dict[str, Any] | None = None,
        batch_size: int = 8,
    ) -> None:
        if PLACEHOLDER not in question:
            raise RewardModelError(f"the question has no {PLACEHOLDER}: write it where the prompt belongs.")
        self.question, self.batch_size = question, batch_size
        self.backend = LocalBackend(
            model,
            revision=revision,
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            template_options=template_options,
        )

    @property
    def identity(self) -> dict[str, str | None]:
        version = f"{source_hash(VQAScore)} {self.question}"
        return {"id": self.backend.model, "revision": self.backend.revision, "code_version": version}

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        requests = [
            Request((Picture(image),), self.question.replace(PLACEHOLDER, prompt))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return self.backend.choose(requests, _ANSWERS)[:, 0].exp()

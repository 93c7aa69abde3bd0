"""VQAScore (Lin et al. 2024, https://arxiv.org/abs/2404.01291) with the paper's CLIP-FlanT5 or any other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import clip_flant5
from .base import BaseRewardModel, source_hash
from .errors import RewardModelError
from .unified_reward.backend import Picture, Request
from .unified_reward.local import LocalBackend

PLACEHOLDER = "{prompt}"
QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
_ANSWERS = ("Yes", "No")


class VQAScore(BaseRewardModel):
    """How likely the model answers "Yes" when asked whether the picture shows its prompt: in [0, 1].

    The probability is over all that the model could say, as in the paper, not over yes and no alone. Scores of
    different models or wordings are not comparable: published ones are those of CLIP-FlanT5, whose score is the
    geometric mean of the probabilities of "Yes" and of the answer's end.

    Args:
        model: hub id or folder of a checkpoint that ``AutoModelForImageTextToText`` knows, or of a CLIP-FlanT5
            (``zhiqiulin/clip-flant5-xl`` or ``-xxl``).
        question: what is asked; ``{prompt}`` stands for the prompt. None is the wording published for the model's kind.
        tokenizer, vision: see :class:`~reward_models.clip_flant5.ClipFlanT5`; CLIP-FlanT5 only.
        device, dtype, revision, template_options: see :class:`~reward_models.unified_reward.LocalBackend`; CLIP-FlanT5
            has no chat template and runs on one device.
        batch_size: pictures scored at once.

    Raises:
        RewardModelError: the checkpoint cannot be loaded, or an option is of the other kind of model.
    """

    name = "vqascore"
    licence = "of the chosen model: CLIP-FlanT5 and Qwen2.5-VL-7B Apache-2.0; Qwen2.5-VL-3B for research only"
    requires = ("transformers",)

    def __init__(
        self,
        model: str | Path = "Qwen/Qwen2.5-VL-7B-Instruct",
        *,
        question: str | None = None,
        tokenizer: str | Path | None = None,
        vision: str | Path | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        template_options: dict[str, Any] | None = None,
        batch_size: int = 8,
    ) -> None:
        if question is not None and PLACEHOLDER not in question:
            raise RewardModelError(f"the question has no {PLACEHOLDER}: write it where the prompt belongs.")
        self.batch_size = batch_size
        self.backend: clip_flant5.ClipFlanT5 | LocalBackend
        if clip_flant5.is_clip_flant5(model, revision):
            if template_options or device == "auto":
                raise RewardModelError("CLIP-FlanT5 takes no template_options, and no device='auto'.")
            self.question = question or clip_flant5.QUESTION
            self.backend = clip_flant5.ClipFlanT5(
                model, tokenizer=tokenizer, vision=vision, revision=revision, device=device, dtype=dtype
            )
            return
        if tokenizer is not None or vision is not None:
            raise RewardModelError(f"{model} is no CLIP-FlanT5: it brings its own tokenizer and vision.")
        self.question = question or QUESTION
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
        settings = {"question": self.question, **self.backend.settings}
        return {
            "id": self.backend.model,
            "revision": self.backend.revision,
            "code_version": source_hash(VQAScore, type(self.backend)),
            "settings": json.dumps(settings, sort_keys=True),
        }

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        questions = [self.question.replace(PLACEHOLDER, prompt) for prompt in prompts]
        if isinstance(self.backend, clip_flant5.ClipFlanT5):
            return self.backend.probability(images, questions, _ANSWERS[0])
        requests = [Request((Picture(image),), asked) for image, asked in zip(images, questions, strict=True)]
        return self.backend.choose(requests, _ANSWERS)[:, 0].exp()

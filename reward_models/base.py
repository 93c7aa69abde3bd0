"""The parts every scorer shares: reading pictures, batching, checking what comes out."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .errors import RewardModelError
from .images import to_pil


class BaseRewardModel(ABC):
    """A reward model that only has to say how one batch of RGB images is scored."""

    name: str
    batch_size: int = 16
    licence: str | None = None  # of the weights; None where their makers state none
    requires: tuple[str, ...] = ()  # packages it imports beyond torch and Pillow

    @property
    @abstractmethod
    def identity(self) -> dict[str, str | None]:
        """``id``, ``revision`` and ``code_version``."""

    @abstractmethod
    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Tensor | Sequence[float | None]:
        """Scores of at most ``batch_size`` RGB images; None or NaN is missing."""

    def score(self, images: Any, prompts: Sequence[str], *, progress: bool = False) -> Tensor:
        """Scores of N pictures under N prompts: (N,) fp32 on the CPU, NaN where missing.

        Args:
            images: N pictures in any form :func:`reward_models.to_pil` reads.
            prompts: N prompts.
            progress: show a progress bar of pictures on the standard error output.

        Raises:
            RewardModelError: the two lists differ in length, or a picture cannot be read.
        """
        if isinstance(prompts, str):
            raise RewardModelError("expected a list of prompts, got one string; put it in a list: [prompt].")
        if not hasattr(images, "__len__"):
            images = list(images)
        if len(images) != len(prompts):
            raise RewardModelError(f"expected a prompt for each picture, got {len(images)} and {len(prompts)} prompts.")
        parts = [torch.empty(0)]
        with tqdm(total=len(prompts), desc=self.name, unit="picture", disable=not progress) as bar:
            for start in range(0, len(prompts), self.batch_size):
                batch = slice(start, start + self.batch_size)
                scores = self.score_batch(to_pil(images[batch], first=start), list(prompts[batch]))
                parts.append(_checked(scores, self.name, prompts[batch]))
                bar.update(len(prompts[batch]))
        return torch.cat(parts)


class FunctionRewardModel(BaseRewardModel):
    """A plain function as a reward model.

    Args:
        function: ``function(images, prompts) -> scores``, lists of RGB images and prompts in, numbers out.
        name: name of its scores; the function's own when None.
    """

    def __init__(self, function: Callable[[list[Image.Image], list[str]], Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))

    @property
    def identity(self) -> dict[str, str | None]:
        target = inspect.unwrap(self.function)
        where = f"{getattr(target, '__module__', None)}:{getattr(target, '__qualname__', self.name)}"
        return {"id": where, "revision": None, "code_version": source_hash(target)}

    def score_batch(self, images: list[Image.Image], prompts: list[str]) -> Any:
        return self.function(images, prompts)


def source_hash(*objects: Any) -> str | None:
    """A short hash of the source code of functions, classes or modules; None where the source is not at hand."""
    digest = hashlib.blake2b(digest_size=6)
    for item in objects:
        try:
            digest.update(inspect.getsource(item).encode())
        except (OSError, TypeError):
            return None
    return digest.hexdigest()


def _checked(scores: Tensor | Iterable[float | None], name: str, prompts: Sequence[str]) -> Tensor:
    """(n,) fp32 on the CPU. Infinite scores are refused: they are no judgement and would poison every mean."""
    if not isinstance(scores, Tensor):
        scores = torch.tensor([float("nan") if s is None else float(s) for s in scores], dtype=torch.float32)
    scores = scores.detach().to("cpu", torch.float32)
    if scores.shape != (len(prompts),):
        raise RewardModelError(f"{name}: expected {len(prompts)} scores, got shape {tuple(scores.shape)}.")
    if torch.isinf(scores).any():
        raise RewardModelError(f"{name}: infinite score for {prompts[int(torch.isinf(scores).int().argmax())]!r}.")
    return scores

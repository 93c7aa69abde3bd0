"""An absolute measure while training: fixed prompts, fixed noise, the deployed sampler, policy against base.

Win rates inside a group are 1/2 on average however good the pictures become, and a training reward can rise while
pictures get worse. So hold-out pictures are drawn as a user would draw them, and scored by models that training does
not see as well as by those that it does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from reward_models import PairwiseRewardModel, can_score

from ..validation import Validation, save_image, side_by_side
from .rewards import Line, Model, labels

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...pipelines import PipelineAdapter
    from ..config import PrefGRPOConfig
    from ..prompts import EncodedPrompts

log = logging.getLogger(__name__)
SHOWN = 8  # pictures of a sheet


class Holdout:
    """Draws and scores the hold-out prompts; lives on the main process.

    Args:
        adapter: family of the pipeline.
        texts: hold-out prompts.
        prompts: their embeddings.
        config: sampling settings of validation pictures, and ``reward_timeout`` for each model.
        folder: keeps the base's pictures, and sheets of the policy's beside them.
        accelerator: autocast.
        training: reward models that training uses.
        unseen: reward models that it does not.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        texts: Sequence[str],
        prompts: EncodedPrompts,
        config: PrefGRPOConfig,
        folder: Path,
        accelerator: Accelerator,
        *,
        training: Sequence[Model],
        unseen: Sequence[Model],
    ) -> None:
        self.texts, self.folder = list(texts), folder
        names = [f"training-{name}" for name in labels(training)] + labels(unseen)
        self.models = dict(zip(names, (*training, *unseen), strict=True))
        self.lines, self.timeout = {name: Line(name) for name in names}, config.reward_timeout
        self.pictures = Validation(
            adapter,
            self.texts,
            prompts.batch(self.texts),
            {name: value[None] for name, value in prompts.unconditional().items()},
            folder,
            steps=config.validation_steps,
            guidance=config.validation_guidance,
            autocast=accelerator.autocast,
        )
        self.base: dict[str, Tensor] = {}

    def prepare(self, denoiser: nn.Module, *, resumed: bool) -> None:
        """Draw the base's pictures before the first step, or read them back."""
        self.pictures.prepare(denoiser, resumed=resumed)

    def measure(self, denoiser: nn.Module, step: int) -> dict[str, float]:
        """Scores of the policy's pictures, of which the first ``SHOWN`` are saved beside the base's.

        Returns:
            By model: ``holdout/NAME`` the mean score, ``holdout/NAME_change`` its paired difference from the base with
            standard error ``holdout/NAME_error``, which a single picture has not. For a judge without scores the change
            is its win rate against the base minus 1/2. Names of training rewards start with ``training-``.
        """
        images = self.pictures.draw(denoiser)
        sheet = side_by_side(self.pictures.base_images[:SHOWN], images[:SHOWN], self.texts[:SHOWN])
        save_image(sheet, self.folder / f"step-{step:06d}.png")
        values: dict[str, float] = {}
        for label, model in self.models.items():
            try:
                values |= self.lines[label].ask(partial(self._of, model, label, images), self.timeout)
            except Exception as error:  # noqa: BLE001 (a hold-out that is not measured must not end a run)
                log.warning("the hold-out could not be scored by %s: %s", label, error)
        return values

    def _of(self, model: Model, label: str, images: list[Image.Image]) -> dict[str, float]:
        values: dict[str, float] = {}
        if can_score(model):
            if label not in self.base or bool(self.base[label].isnan().all()):  # not at the start: it may be away then
                self.base[label] = model.score(self.pictures.base_images, self.texts).double()
            scores = model.score(images, self.texts).double()
            found = scores[~scores.isnan()]
            if len(found):
                values[f"holdout/{label}"] = float(found.mean())
            change = scores - self.base[label]
        else:
            assert isinstance(model, PairwiseRewardModel)
            change = self._against_base(model, images)
        change = change[~change.isnan()]
        if len(change):
            values[f"holdout/{label}_change"] = float(change.mean())
        if len(change) > 1:
            values[f"holdout/{label}_error"] = float(change.std(correction=1)) / math.sqrt(len(change))
        return values

    def _against_base(self, judge: PairwiseRewardModel, images: list[Image.Image]) -> Tensor:
        base = self.pictures.base_images
        forth = judge.compare(list(zip(images, base, strict=True)), self.texts).double()
        back = judge.compare(list(zip(base, images, strict=True)), self.texts).double()
        return (forth + 1 - back) / 2 - 0.5


def diversity(images: Sequence[Image.Image], edge: int = 32) -> float:
    """Mean distance between two pictures of a group: root mean square of pixels in [0, 1], at ``edge`` x ``edge``."""
    if len(images) < 2:
        return 0.0
    small = [image.convert("RGB").resize((edge, edge), Image.Resampling.BOX) for image in images]
    pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in small])
    distance = torch.pdist(pixels.double() / 255) / math.sqrt(pixels.shape[1])
    return float(distance.mean())

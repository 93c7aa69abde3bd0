"""Fine-tuning on the winners alone."""

from __future__ import annotations

from torch import Tensor

from ..objectives import LossOutput, sft_loss
from .base import PreferenceTrainer
from .batches import Batch
from .config import SFTConfig


class SFTTrainer(PreferenceTrainer):
    """The control: same rows, noise and budget as a preference method, but only the winner's error counts."""

    method = "sft"
    config_class = SFTConfig

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        return sft_loss(policy_error)

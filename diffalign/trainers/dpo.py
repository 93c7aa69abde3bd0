"""Diffusion-DPO."""

from __future__ import annotations

from torch import Tensor

from ..objectives import LossOutput, dpo_loss
from .base import PreferenceTrainer
from .batches import Batch
from .config import DPOConfig


class DPOTrainer(PreferenceTrainer):
    """Trains on pairs with :func:`diffalign.objectives.dpo_loss` (Wallace et al. 2023, arXiv:2311.12908)."""

    method = "dpo"
    config_class = DPOConfig
    config: DPOConfig

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        assert reference_error is not None
        return dpo_loss(
            policy_error,
            reference_error,
            beta=self.config.beta,
            loss_type=self.config.loss_type,
            probability=batch.probability if self.config.ties == "soft" else None,
        )

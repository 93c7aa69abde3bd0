"""MaPO: pairs without a reference model."""

from __future__ import annotations

from torch import Tensor

from ..objectives import LossOutput, mapo_loss
from .base import PreferenceTrainer
from .batches import Batch
from .config import MaPOConfig


class MaPOTrainer(PreferenceTrainer):
    """Trains on pairs with :func:`diffalign.objectives.mapo_loss` (Hong et al. 2024, arXiv:2406.06424)."""

    method = "mapo"
    config_class = MaPOConfig
    config: MaPOConfig

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        config = self.config
        return mapo_loss(
            policy_error,
            variant=config.variant,
            beta=config.margin_weight,
            kappa=config.kappa,
            scale=config.margin_scale,
            exponent=config.exponent,
        )

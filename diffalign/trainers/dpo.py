"""Diffusion-DPO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..objectives import AdaptiveBeta, LossOutput, dpo_loss, with_sft
from .base import PreferenceTrainer
from .batches import Batch
from .config import DPOConfig


class DPOTrainer(PreferenceTrainer):
    """Trains on pairs with :func:`diffalign.objectives.dpo_loss` (Wallace et al. 2023, arXiv:2311.12908)."""

    method = "dpo"
    config_class = DPOConfig
    config: DPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        target = self.config.target_gradient_factor
        self.adaptive = AdaptiveBeta(self.config.beta, target=target) if target is not None else None

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        config = self.config
        assert reference_error is not None
        out = dpo_loss(
            policy_error,
            reference_error,
            beta=self.adaptive.beta if self.adaptive else config.beta,
            loss_type=config.loss_type,
            probability=batch.probability if config.ties == "soft" else None,
            label_smoothing=config.label_smoothing,
            smoothing=config.smoothing,
        )
        if not config.sft_weight:
            return out
        p = batch.probability  # 1; 1/2 for a tie, whose images share the term: the order of a table decides nothing
        return with_sft(out, policy_error, config.sft_weight, preference=torch.stack((p, 1 - p), 1))

    def after_step(self, metrics: dict[str, float]) -> dict[str, float]:
        if self.adaptive is None:
            return {}
        used = self.adaptive.beta
        self.adaptive.update(metrics["gradient_factor"])
        return {"beta": used}

    def state_dict(self) -> dict[str, Any]:
        return self.adaptive.state_dict() if self.adaptive else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.adaptive is None:
            super().load_state_dict(state)
            return
        try:
            self.adaptive.load_state_dict(state)
        except ValueError as error:
            raise CheckpointError(
                f"target_gradient_factor={self.config.target_gradient_factor} cannot continue the beta of this "
                f"checkpoint: {error} Resume with the beta and target_gradient_factor it was written with, or train "
                "into another output_dir."
            ) from error

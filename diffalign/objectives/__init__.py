"""Preference objectives: pure functions of matrices of denoising errors. Nothing here knows of models or trainers."""

from .base import LossOutput
from .dpo import dpo_loss
from .sft import sft_loss

__all__ = ["LossOutput", "dpo_loss", "sft_loss"]

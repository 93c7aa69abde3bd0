"""Trainers: one loop, one thin file per method."""

from .base import PreferenceTrainer
from .config import DPOConfig, SFTConfig, TrainingConfig
from .dpo import DPOTrainer
from .sft import SFTTrainer

__all__ = ["DPOConfig", "DPOTrainer", "PreferenceTrainer", "SFTConfig", "SFTTrainer", "TrainingConfig"]

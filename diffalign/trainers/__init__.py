"""Trainers: one loop, one thin file per method. Imported on first use: reading settings needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import PreferenceTrainer
    from .config import DPOConfig, SFTConfig, TrainingConfig
    from .dpo import DPOTrainer
    from .sft import SFTTrainer

_HOME = {
    "DPOConfig": "config",
    "DPOTrainer": "dpo",
    "PreferenceTrainer": "base",
    "SFTConfig": "config",
    "SFTTrainer": "sft",
    "TrainingConfig": "config",
}

__all__ = ["DPOConfig", "DPOTrainer", "PreferenceTrainer", "SFTConfig", "SFTTrainer", "TrainingConfig"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

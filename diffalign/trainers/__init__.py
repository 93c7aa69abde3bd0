"""Trainers: one loop, one thin file per method. Imported on first use: reading settings needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import PreferenceTrainer
    from .config import DPOConfig, MaPOConfig, RankDPOConfig, SFTConfig, SmPOConfig, TrainingConfig
    from .dpo import DPOTrainer
    from .mapo import MaPOTrainer
    from .rankdpo import RankDPOTrainer
    from .sft import SFTTrainer
    from .smpo import SmPOTrainer

_HOME = {
    "DPOConfig": "config",
    "DPOTrainer": "dpo",
    "MaPOConfig": "config",
    "MaPOTrainer": "mapo",
    "PreferenceTrainer": "base",
    "RankDPOConfig": "config",
    "RankDPOTrainer": "rankdpo",
    "SFTConfig": "config",
    "SFTTrainer": "sft",
    "SmPOConfig": "config",
    "SmPOTrainer": "smpo",
    "TrainingConfig": "config",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "PreferenceTrainer",
    "RankDPOConfig",
    "RankDPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SmPOConfig",
    "SmPOTrainer",
    "TrainingConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

"""Trainers: one loop, one thin file per method. Imported on first use: reading settings needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import PreferenceTrainer
    from .config import (
        DPOConfig,
        MaPOConfig,
        PrefGRPOConfig,
        RankDPOConfig,
        SelfNPOConfig,
        SFTConfig,
        SmPOConfig,
        TrainingConfig,
    )
    from .dpo import DPOTrainer
    from .grpo.trainer import PrefGRPOTrainer
    from .mapo import MaPOTrainer
    from .rankdpo import RankDPOTrainer
    from .selfnpo import SelfNPOTrainer
    from .sft import SFTTrainer
    from .smpo import SmPOTrainer

_HOME = {
    "DPOConfig": "config",
    "DPOTrainer": "dpo",
    "MaPOConfig": "config",
    "MaPOTrainer": "mapo",
    "PrefGRPOConfig": "config",
    "PrefGRPOTrainer": "grpo.trainer",
    "PreferenceTrainer": "base",
    "RankDPOConfig": "config",
    "RankDPOTrainer": "rankdpo",
    "SFTConfig": "config",
    "SFTTrainer": "sft",
    "SelfNPOConfig": "config",
    "SelfNPOTrainer": "selfnpo",
    "SmPOConfig": "config",
    "SmPOTrainer": "smpo",
    "TrainingConfig": "config",
}

__all__ = [
    "DPOConfig",
    "DPOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "PrefGRPOConfig",
    "PrefGRPOTrainer",
    "PreferenceTrainer",
    "RankDPOConfig",
    "RankDPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SelfNPOConfig",
    "SelfNPOTrainer",
    "SmPOConfig",
    "SmPOTrainer",
    "TrainingConfig",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)

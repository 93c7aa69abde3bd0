"""Preference alignment of diffusion models around diffusers pipelines.

    from diffalign import DPOConfig, DPOTrainer, load_preferences

The public names below are imported on first use, so that ``import diffalign`` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# On some CPUs MKL's rounding depends on where in memory a tensor happens to lie, so that a model and its copy differ in
# the last digit. Read at MKL's first call; costs nothing measurable.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

if TYPE_CHECKING:
    from .data import load_preferences
    from .errors import CheckpointError, ConfigError, DataError, DiffalignError, DivergenceError
    from .pipelines import load_pipeline
    from .trainers import (
        DPOConfig,
        DPOTrainer,
        MaPOConfig,
        MaPOTrainer,
        PreferenceTrainer,
        PrefGRPOConfig,
        PrefGRPOTrainer,
        RankDPOConfig,
        RankDPOTrainer,
        SelfNPOConfig,
        SelfNPOTrainer,
        SFTConfig,
        SFTTrainer,
        SmPOConfig,
        SmPOTrainer,
        TrainingConfig,
    )

_HOMES = {
    "errors": ["CheckpointError", "ConfigError", "DataError", "DiffalignError", "DivergenceError"],
    "data": ["load_preferences"],
    "pipelines": ["load_pipeline"],
    "trainers": [
        *(
            "DPOConfig",
            "DPOTrainer",
            "MaPOConfig",
            "MaPOTrainer",
            "PrefGRPOConfig",
            "PrefGRPOTrainer",
            "PreferenceTrainer",
            "RankDPOConfig",
        ),
        *("RankDPOTrainer", "SFTConfig", "SFTTrainer", "SelfNPOConfig", "SelfNPOTrainer", "SmPOConfig"),
        *("SmPOTrainer", "TrainingConfig"),
    ],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "DiffalignError",
    "DivergenceError",
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
    "__version__",
    "load_pipeline",
    "load_preferences",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    if _HOME_OF[name] != "errors":
        from .environment import check_torch_pair

        check_torch_pair()
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

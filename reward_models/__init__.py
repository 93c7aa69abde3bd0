"""Scores for pictures under prompts, usable without anything else of this repository.

from reward_models import load_reward_model
scores = load_reward_model("clip").score(images, prompts)   # (N,) fp32, NaN where a score is missing
"""

from .base import BaseRewardModel, FunctionRewardModel
from .errors import RewardModelError
from .images import to_pil
from .protocol import PairwiseRewardModel, RewardModel, can_score
from .registry import available_reward_models, load_reward_model

__all__ = [
    "BaseRewardModel",
    "FunctionRewardModel",
    "PairwiseRewardModel",
    "RewardModel",
    "RewardModelError",
    "available_reward_models",
    "can_score",
    "load_reward_model",
    "to_pil",
]

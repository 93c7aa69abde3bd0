"""Preference objectives: pure functions of matrices of denoising errors. Nothing here knows of models or trainers."""

from .adaptive import AdaptiveBeta
from .advantages import combined_advantages, group_advantages
from .base import LossOutput
from .convert import CONVENTIONS, convert_beta
from .dpo import dpo_loss
from .grpo import grpo_loss, step_kl
from .mapo import mapo_loss
from .rankdpo import pair_weights, rankdpo_loss
from .sft import sft_loss, with_sft
from .smpo import smpo_loss, soft_probability
from .twopass import error_gradients

__all__ = [
    "CONVENTIONS",
    "AdaptiveBeta",
    "LossOutput",
    "combined_advantages",
    "convert_beta",
    "dpo_loss",
    "error_gradients",
    "group_advantages",
    "grpo_loss",
    "mapo_loss",
    "pair_weights",
    "rankdpo_loss",
    "sft_loss",
    "smpo_loss",
    "soft_probability",
    "step_kl",
    "with_sft",
]

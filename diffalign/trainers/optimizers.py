"""The optimizer and the learning-rate schedule of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from torch.optim.lr_scheduler import LRScheduler

from ..config_rules import SCHEDULES
from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import TrainingConfig

log = logging.getLogger(__name__)
OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor")


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config.optimizer`` names, over ``parameters``.

    Args:
        parameters: what is trained.
        config: reads ``optimizer``, ``learning_rate``, ``weight_decay`` and, for AdamW, its betas and epsilon.

    Returns:
        AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), its 8-bit form (Dettmers et al. 2022, arXiv:2110.02861),
        or Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with the learning rate as given: no relative step and no
        scaling by parameter size, as Diffusion-DPO trained SDXL.

    Raises:
        ConfigError: unknown name, nothing to train, or a missing package.
    """
    parameters = list(parameters)
    if not parameters:
        raise ConfigError("nothing to train: no parameter requires a gradient. Check adapter and lora_targets.")
    rate, decay = config.learning_rate, config.weight_decay
    betas = (config.adam_beta1, config.adam_beta2)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, betas=betas, eps=config.adam_epsilon, weight_decay=decay)
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError(
                "optimizer=adamw_8bit needs bitsandbytes, which cannot be imported "
                f"({error}). Install it with `pip install 'diffalign[bnb]'`, or choose optimizer=adamw."
            ) from error
        return AdamW8bit(parameters, lr=rate, betas=betas, eps=config.adam_epsilon, weight_decay=decay)
    if config.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters, lr=rate, weight_decay=decay, relative_step=False, scale_parameter=False, warmup_init=False
        )
    raise ConfigError(f"unknown optimizer {config.optimizer!r}{_nearest(config.optimizer, OPTIMIZERS)}.")


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> LRScheduler:
    """The learning-rate schedule that ``config.lr_schedule`` names.

    Call ``.step()`` once after each optimizer step. It counts optimizer steps and nothing else: warm-up is not
    multiplied by the number of processes or micro-batches, so the schedule must not be wrapped by accelerate.

    Args:
        optimizer: whose learning rate is set.
        config: reads ``lr_schedule`` and ``warmup_steps``.
        total_steps: optimizer steps of the whole run.

    Raises:
        ConfigError: unknown name, a warm-up that the schedule would ignore, or a rate it cannot decay from.
    """
    name, warmup = config.lr_schedule, config.warmup_steps
    if name not in SCHEDULES:
        raise ConfigError(f"unknown lr_schedule {name!r}{_nearest(name, SCHEDULES)}.")
    if warmup < 0:
        raise ConfigError(f"warmup_steps must be 0 or more; got {warmup}.")
    if name == "constant" and warmup:
        raise ConfigError(
            f"lr_schedule=constant has no warm-up, but warmup_steps={warmup}. "
            "Choose lr_schedule=constant_with_warmup, or warmup_steps=0."
        )
    if warmup and warmup >= total_steps:
        log.warning(
            "warm-up of %d steps is not shorter than the run (%d steps): the learning rate never reaches its peak %g.",
            warmup,
            total_steps,
            config.learning_rate,
        )
    from diffusers.optimization import get_scheduler

    try:
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
    except ValueError as error:  # polynomial decays to 1e-7 and refuses to start below it
        raise ConfigError(f"lr_schedule={name} cannot be used here: {error}") from error


def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known)}"

"""Which forward process a scheduler's configuration describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from .base import Schedule
from .flow import FlowSchedule
from .schedule import NoiseSchedule


def schedule_from(scheduler_config: Mapping[str, Any], *, zero_terminal_snr: bool = False) -> Schedule:
    """The forward process of a diffusers scheduler: variance-preserving if it has betas, else flow matching.

    Args:
        scheduler_config: ``pipeline.scheduler.config``.
        zero_terminal_snr: see :meth:`NoiseSchedule.from_scheduler`.

    Raises:
        ConfigError: a scheduler of neither kind, or ``zero_terminal_snr`` for a flow model.
    """
    if scheduler_config.get("use_flow_sigmas") or scheduler_config.get("prediction_type") == "flow_prediction":
        raise ConfigError(
            "this scheduler samples a flow model with a solver made for others (use_flow_sigmas). Give the pipeline a "
            "FlowMatchEulerDiscreteScheduler with the same shift; the model stays the same."
        )
    if "beta_schedule" in scheduler_config or scheduler_config.get("trained_betas") is not None:
        return NoiseSchedule.from_scheduler(scheduler_config, zero_terminal_snr=zero_terminal_snr)
    schedule = FlowSchedule.from_scheduler(scheduler_config)
    if zero_terminal_snr:
        raise ConfigError(
            "zero_terminal_snr does not apply to a flow model: its last timestep is pure noise already. Leave it out."
        )
    return schedule

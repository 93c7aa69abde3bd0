"""Parameterisation of diffusion models: noise, targets and errors, timesteps and inversion, all in fp32."""

from .base import LOSS_SPACES, Schedule
from .detect import schedule_from
from .flow import FlowSchedule
from .inversion import Inversion, InversionGrid, denoise, inversion_grid, invert
from .schedule import NoiseSchedule
from .stochastic import (
    SamplingGrid,
    Transition,
    drift,
    flow_grid,
    log_density,
    noise_grid,
    transitions,
)
from .timesteps import TIMESTEP_DENSITIES, draw_timestep, timestep_probabilities

__all__ = [
    "LOSS_SPACES",
    "TIMESTEP_DENSITIES",
    "FlowSchedule",
    "Inversion",
    "InversionGrid",
    "NoiseSchedule",
    "SamplingGrid",
    "Schedule",
    "Transition",
    "denoise",
    "draw_timestep",
    "drift",
    "flow_grid",
    "inversion_grid",
    "invert",
    "log_density",
    "noise_grid",
    "schedule_from",
    "timestep_probabilities",
    "transitions",
]

"""Parameterisation of diffusion models: noise, targets and errors, timesteps and inversion, all in fp32."""

from .base import Schedule, schedule_from
from .flow import FlowSchedule
from .inversion import Inversion, InversionGrid, denoise, inversion_grid, invert
from .schedule import LOSS_SPACES, NoiseSchedule
from .timesteps import TIMESTEP_DENSITIES, draw_timestep, timestep_probabilities

__all__ = [
    "LOSS_SPACES",
    "TIMESTEP_DENSITIES",
    "FlowSchedule",
    "Inversion",
    "InversionGrid",
    "NoiseSchedule",
    "Schedule",
    "denoise",
    "draw_timestep",
    "inversion_grid",
    "invert",
    "schedule_from",
    "timestep_probabilities",
]

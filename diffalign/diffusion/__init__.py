"""Parameterisation of diffusion models: noise, targets and errors, all in fp32."""

from .schedule import LOSS_SPACES, NoiseSchedule, draw_timestep

__all__ = ["LOSS_SPACES", "NoiseSchedule", "draw_timestep"]

"""Walk part of the way from noise to a picture, and add noise again: the data of Self-NPO.

Truncated diffusion fine-tuning (Self-NPO, 2505.11777) trains a model on what a teacher makes up. The teacher walks from
pure noise down to a timestep t and states the clean latent it sees there. Noise is then added *to x_t* up to a higher
timestep s, and the student has to see the same clean latent from there. With x = a x0 + b eps and r = a_s / a_t

    x_s = r x_t + sqrt(b_s^2 - r^2 b_t^2) eps'

so that x_s has the law of the forward process whenever x_t has. Adding noise to the clean latent that was seen, a
blurred mean, would give another law.

A consequence: x0 -> x_t -> x_s is a Markov chain, so E[E[x0 | x_t] | x_s] = E[x0 | x_s]. A perfect teacher that neither
guides nor errs in its walk is a fixed point of this training. What moves the student is guidance in the teacher, the
coarse walk, and the model's own disagreement with itself between t and s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import Schedule
from .inversion import Predict


@dataclass(frozen=True)
class Truncated:
    """Where a teacher's walk stopped.

    Args:
        latents: (N, C, h, w) x_t, fp32, without gradient.
        clean: (N, C, h, w) the clean latent that the teacher sees in it.
    """

    latents: Tensor
    clean: Tensor


def descent(stop: Tensor, steps: int, num_timesteps: int) -> Tensor:
    """Evenly spaced timesteps from the last one down to each row's stop.

    Args:
        stop: (N,) int64 timesteps in [0, T).
        steps: K, the same for all rows, so that a batch walks together.
        num_timesteps: T.

    Returns:
        (N, K + 1) int64, from T - 1 to exactly ``stop``; a timestep is repeated where the way is shorter than K.

    Raises:
        ConfigError: ``steps`` below 1, or a stop outside the schedule.
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1; got {steps}.")
    if not bool(((stop >= 0) & (stop < num_timesteps)).all()):
        raise ConfigError(f"timesteps must lie in 0..{num_timesteps - 1}; got {stop.tolist()}.")
    last = num_timesteps - 1
    way = (last - stop.long())[:, None] * torch.arange(steps + 1, device=stop.device)
    return last - (2 * way + steps) // (2 * steps)  # rounded half up


@torch.no_grad()
def truncated_walk(predict: Predict, start: Tensor, times: Tensor, schedule: Schedule) -> Truncated:
    """DDIM (flow models: Euler) along each row's own timesteps, then the clean latent seen at the last one.

    Args:
        predict: the teacher; see :data:`diffalign.diffusion.inversion.Predict`. Called once for each column of
            ``times``, with the rows that move.
        start: (N, C, h, w) latents at ``times[:, 0]``.
        times: (N, K + 1) int64 falling timesteps; repeated ones are no step.
        schedule: of the model.
    """
    x = start.float().clone()
    times = times.to(x.device)
    for now, then in zip(times.T[:-1], times.T[1:], strict=True):
        rows = (now != then).nonzero().squeeze(1)
        if not len(rows):
            continue
        clean, noise = _seen(predict, x[rows], now[rows], rows, schedule)
        x[rows] = schedule.add_noise(clean, noise, then[rows])
    everyone = torch.arange(len(x), device=x.device)
    return Truncated(x, _seen(predict, x, times[:, -1], everyone, schedule)[0])


def renoise(x_t: Tensor, noise: Tensor, t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """Carry noisy latents on along the forward process, from t to s.

    Args:
        x_t: (N, C, h, w).
        noise: same shape, unit variance.
        t, s: (N,) int64 timesteps, t <= s; equal ones leave x_t as it is.

    Returns:
        (N, C, h, w) fp32.

    Raises:
        ConfigError: a t above its s.
    """
    if bool((t > s).any()):
        raise ConfigError(f"noise can only be added: t must not be above s; got {t.tolist()} and {s.tolist()}.")
    signal, spread = (table.to(x_t.device) for table in schedule.levels(torch.float64))
    ratio = signal[s + 1] / signal[t + 1]
    added = (spread[s + 1].square() - (ratio * spread[t + 1]).square()).clamp_min(0).sqrt()
    shape = (-1, *[1] * (x_t.ndim - 1))
    return ratio.float().view(shape) * x_t.float() + added.float().view(shape) * noise.float()


def _seen(predict: Predict, x: Tensor, t: Tensor, rows: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Clean latent and noise that the network's output implies, fp32."""
    output = predict(x, schedule.time(t), rows)
    return schedule.to_x0(output, x, t), schedule.to_epsilon(output, x, t)

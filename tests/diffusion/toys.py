"""Hand-made networks whose answers are known exactly, in the form ``predict(x, time, rows)``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffalign.diffusion import FlowSchedule, NoiseSchedule, Schedule

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample", "flow")
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def schedule_of(kind: str = "epsilon", *, zero_terminal_snr: bool = False) -> Schedule:
    if kind == "flow":
        return FlowSchedule()
    return NoiseSchedule.from_scheduler({**SD, "prediction_type": kind}, zero_terminal_snr=zero_terminal_snr)


def scales(schedule: Schedule, time: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """a and b at what the network is told: t for VP, t + 1 for flow."""
    level = time.long() if schedule.prediction_type == "flow" else time + 1
    return tuple(table[level].view(-1, *[1] * (like.ndim - 1)) for table in schedule.levels(like.dtype))


def speaks(schedule: Schedule, x0_hat: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Predict:
    """A network that believes in the clean picture x0_hat(x, a, b) and says so in the schedule's own space."""

    def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
        a, b = scales(schedule, time, x)
        clean = x0_hat(x, a, b)
        noise = (x - a * clean) / b
        kind = schedule.prediction_type
        return {"sample": clean, "epsilon": noise, "v_prediction": a * noise - b * clean, "flow": noise - clean}[kind]

    return predict


def gaussian(schedule: Schedule, variance: float = 0.25) -> Predict:
    """The best possible network for x0 ~ N(0, variance)."""
    return speaks(schedule, lambda x, a, b: a * variance * x / (a * a * variance + b * b))


def bimodal(schedule: Schedule, mode: float = 1.0, width: float = 0.2) -> Predict:
    """The best possible network for two narrow modes at +-mode: not a contraction between them."""

    def x0_hat(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        total = a * a * width**2 + b * b
        pull = torch.tanh(a * mode * x / total)
        return mode * pull + a * width**2 / total * (x - a * mode * pull)

    return speaks(schedule, x0_hat)


def curved(schedule: Schedule) -> Predict:
    """A smooth nonlinear network without any meaning, whose rows do not mix."""
    return lambda x, time, rows: torch.sin(1.3 * x + 0.01 * time.view(-1, 1, 1, 1).to(x)) + 0.2 * x


def normal(n: int, *shape: int, std: float = 1.0, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return std * torch.randn(n, *(shape or (1, 1, 1)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def last(renoise: int) -> list[float]:
    return [0.0] * renoise + [1.0]

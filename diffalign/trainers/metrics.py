"""Means over all rows of an optimizer step, whatever the micro-batches and processes they came in."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

BUCKETED = ("rewards/accuracies", "rewards/margins", "error/winner", "error/winner_change", "error/loser_change")
Rows = dict[str, list[float]]


class MetricAccumulator:
    """Collects per-row values and reduces them to means.

    Rows are kept, not running sums, and added in fp64 with exact rounding (``math.fsum``): the mean does not depend
    on how rows were divided over micro-batches and processes, to the last bit. Values stay on their device until
    :meth:`reduce`, so collecting does not wait for the accelerator.

    Args:
        num_timesteps: T of the noise schedule.
        buckets: how many equal parts of [0, T) get means of their own; 0 for none.
        bucketed: names of the values that are also reported per part, as ``timesteps/0-249/<name>``.
    """

    def __init__(self, num_timesteps: int = 1000, buckets: int = 4, bucketed: Sequence[str] = BUCKETED) -> None:
        if buckets < 0 or num_timesteps < max(buckets, 1):
            raise ValueError(f"buckets must lie in 0..num_timesteps; got {buckets} of {num_timesteps}.")
        self.num_timesteps, self.buckets, self.bucketed = num_timesteps, buckets, tuple(bucketed)
        self._pending: list[tuple[tuple[str, ...], Tensor, Tensor]] = []

    def add(self, values: Mapping[str, Tensor], timesteps: Tensor) -> None:
        """Take in one micro-batch.

        Args:
            values: (B,) per row, by name; detached here.
            timesteps: (B,) integers in [0, T).

        Raises:
            ValueError: a value that is not (B,).
        """
        for name, value in values.items():
            if value.shape != timesteps.shape or value.ndim != 1:
                raise ValueError(
                    f"{name} must have one value per row, shape {tuple(timesteps.shape)}; got {tuple(value.shape)}."
                )
        if values:
            stacked = torch.stack([value.detach() for value in values.values()])
            self._pending.append((tuple(values), stacked, timesteps.detach()))

    def reduce(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Mean of every value over all rows of all processes since the last call; empties the accumulator.

        Every process must call it, also one that saw no row; all get the same numbers.

        Args:
            accelerator: gathers the rows of other processes; None means there are none.

        Returns:
            Means by name; a name that no row had is absent.
        """
        rows = _merge(_gather(self._take(), accelerator))
        return {name: _mean(rows[name]) for name in sorted(rows)}

    def _take(self) -> Rows:
        """This process's rows by final name, on the CPU; empties the accumulator."""
        rows: defaultdict[str, list[float]] = defaultdict(list)
        for names, stacked, timesteps in self._pending:
            steps = timesteps.tolist()
            for name, numbers in zip(names, stacked.cpu().double().tolist(), strict=True):
                rows[name] += numbers
                if self.buckets and name in self.bucketed:
                    for step, number in zip(steps, numbers, strict=True):
                        rows[f"timesteps/{self._bucket(step)}/{name}"].append(number)
        self._pending = []
        return dict(rows)

    def _bucket(self, timestep: int) -> str:
        index = timestep * self.buckets // self.num_timesteps
        low, high = (-(-i * self.num_timesteps // self.buckets) for i in (index, index + 1))
        return f"{low}-{high - 1}"


def _gather(rows: Rows, accelerator: Accelerator | None) -> list[Rows]:
    if accelerator is None or accelerator.num_processes == 1:
        return [rows]
    from accelerate.utils import gather_object

    return gather_object([rows])


def _merge(parts: Iterable[Rows]) -> Rows:
    merged: defaultdict[str, list[float]] = defaultdict(list)
    for part in parts:
        for name, numbers in part.items():
            merged[name] += numbers
    return dict(merged)


def _mean(numbers: Sequence[float]) -> float:
    if all(map(math.isfinite, numbers)):
        return math.fsum(numbers) / len(numbers)
    return sum(numbers) / len(numbers)  # fsum refuses inf - inf, which must show as NaN

"""A rollout: what its updates need, how it rests in a checkpoint, and what is logged of its judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from .rewards import GroupReward
from .rollouts import Chunk, Moment, Plan, Sample

SUMMED = ("calls", "pairs")  # of judges' numbers; the others are means over groups


@dataclass
class Rollout:
    """What an iteration's updates need.

    Args:
        plan: the steps that were drawn.
        chunks: this process's pictures, in the order of updates.
        advantages: (N,) fp64 of all pictures of all processes.
        metrics: of the rollout; logged with its first update.
    """

    plan: Plan
    chunks: list[Chunk]
    advantages: Tensor
    metrics: dict[str, float] = field(default_factory=dict)

    def save(self, file: Path) -> None:
        """Write trajectories and advantages; samples and plan follow from the iteration."""
        tensors = {"advantages": self.advantages}
        for number, chunk in enumerate(self.chunks):
            for index, moment in chunk.moments.items():
                parts = {name: value for name, value in vars(moment).items() if value is not None}
                # copies: the end of one step is the same tensor as the start of the next, which the format refuses
                tensors |= {f"{number}.{index}.{name}": value.cpu().clone() for name, value in parts.items()}
        save_file(tensors, file)

    @classmethod
    def load(cls, file: Path, plan: Plan, samples: Sequence[list[Sample]], device: torch.device) -> Rollout:
        """Read back what :meth:`save` wrote.

        Args:
            file: the file.
            plan: of the same iteration.
            samples: of each chunk.
            device: where trajectories are kept.

        Raises:
            CheckpointError: it has other chunks, as of another number of processes.
        """
        tensors = load_file(file, device=str(device))
        advantages = tensors.pop("advantages").cpu()
        parts: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, index, what = name.split(".")
            parts.setdefault((int(number), int(index)), {})[what] = value
        if {number for number, _ in parts} != set(range(len(samples))):
            raise CheckpointError(
                f"{file} does not hold the {len(samples)} parts of this process's pictures: it was written by another "
                "number of processes or batch_size. Resume with those, or from a checkpoint at the end of a rollout."
            )
        chunks = [Chunk(members) for members in samples]
        for (chunk, step), values in parts.items():
            chunks[chunk].moments[step] = Moment(**values)
        return cls(plan, chunks, advantages)


def judge_metrics(names: Sequence[str], found: Sequence[list[GroupReward]]) -> dict[str, float]:
    """What the judges did.

    Args:
        names: of the reward models.
        found: of each group, what each model said.
    """
    metrics: dict[str, float] = {}
    for column, name in enumerate(names):
        results = [columns[column] for columns in found]
        for key in sorted({key for result in results for key in result.stats}):
            values = [result.stats[key] for result in results if key in result.stats]
            metrics[f"reward/{name}/{key}"] = math.fsum(values) / (1 if key in SUMMED else len(values))
        spreads = [_spread(result.reward) for result in results]
        metrics[f"reward/{name}/spread_of_reward"] = math.fsum(spreads) / len(spreads)
        metrics[f"reward/{name}/timeouts"] = float(sum(result.timed_out for result in results))
        metrics[f"time/{name}"] = math.fsum(result.seconds for result in results)
    return metrics


def _spread(reward: Tensor) -> float:
    found = reward[~reward.isnan()]
    return float(found.std(correction=0)) if len(found) else 0.0

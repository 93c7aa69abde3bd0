"""A rollout: what its updates need, how it rests in a checkpoint, and what is logged of its judges."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import CheckpointError
from .rewards import GroupReward
from .rollouts import Chunk, Moment, Plan, Sample

SUMMED = ("calls", "pairs", "questions")  # of judges' numbers; the others are means over groups
#: Settings that decide what a stored rollout holds and how its steps are found again.
REPLAYED = (
    *("objective", "matching_draws", "min_timestep", "max_timestep", "timesteps", "timestep_density", "density_mean"),
    *("density_std", "loss_space"),
    *("batch_size", "resolution", "mixed_precision", "latent_dtype", "max_prompt_tokens", "guidance_embedding"),
    *("zero_terminal_snr", "sampling_steps", "sampler", "noise_level", "guidance_scale", "final_steps", "sde_window"),
    *("sde_window_moves", "sde_window_stay", "timestep_fraction", "log_prob", "ratio_norm"),
)


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

    def save(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Write trajectories and advantages; samples and plan follow from the iteration and these settings."""
        tensors = {"advantages": self.advantages}
        for number, chunk in enumerate(self.chunks):
            if chunk.latents is not None:
                tensors[f"{number}.latents"] = chunk.latents.cpu().contiguous()
            for index, moment in chunk.moments.items():
                parts = {name: value for name, value in vars(moment).items() if value is not None}
                # copies: the end of one step is the same tensor as the start of the next, which the format refuses
                tensors |= {
                    f"{number}.{index}.{name}": value.cpu().clone(memory_format=torch.contiguous_format)
                    for name, value in parts.items()
                }
        save_file(tensors, file, metadata={"settings": json.dumps(dict(settings))})

    @classmethod
    def load(
        cls, file: Path, settings: Mapping[str, Any], plan: Plan, samples: Sequence[list[Sample]], device: torch.device
    ) -> Rollout:
        """Read back what :meth:`save` wrote.

        Args:
            file: the file.
            settings: must equal those it was written with.
            plan: of the same iteration.
            samples: of each chunk.
            device: where trajectories are kept.

        Raises:
            CheckpointError: a setting differs, so that other steps or other pictures would be trained on.
        """
        with safe_open(file, "pt") as opened:
            written = json.loads((opened.metadata() or {}).get("settings", "{}"))
        if differing := [name for name, value in settings.items() if written.get(name) != value]:
            name = differing[0]
            raise CheckpointError(
                f"{file} was written in the middle of a rollout with {name}={written.get(name)}, this run has "
                f"{settings[name]}. Resume with the same {name}, or from a checkpoint at the end of a rollout."
            )
        tensors = load_file(file, device=str(device))
        advantages = tensors.pop("advantages").cpu()
        chunks = [Chunk(members) for members in samples]
        parts: dict[tuple[int, int], dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, *term, what = name.split(".")
            if term:
                parts.setdefault((int(number), int(term[0])), {})[what] = value
            else:
                chunks[int(number)].latents = value
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

"""Which rows an optimizer step sees, and everything random about them.

The order of rows is one endless stream of keyed permutations, cut into global batches. A step's rows depend on the
step alone, so a resumed run continues exactly, and processes and micro-batches only divide what is already decided.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..diffusion import NoiseSchedule, draw_timestep
from ..randomness import keyed_generator, keyed_normal, keyed_permutation, keyed_uniform

if TYPE_CHECKING:
    from ..data import EncodedPreferences, Example
    from ..pipelines import PipelineAdapter
    from .config import TrainingConfig

Bucket = tuple[int, int]


@dataclass(frozen=True)
class Draw:
    """One visit of the stream to one example (a pair or a list of a row)."""

    example: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B prompts with k images each, best image first.

    Args:
        row_ids: content hash of each row.
        latents: (B, k, C, h, w) clean scaled latents, fp32.
        noise: (B, k, C, h, w) fp32; the images of a prompt share it.
        timesteps: (B,) int64, shared by the images of a prompt.
        conditioning: prompt tensors by name, (B, ...).
        size_ids: (B, k, 6) fp32, see :meth:`PipelineAdapter.predict`.
        probability: (B,) that the first image is the better one: 1, or 1/2 for a tie kept soft.
    """

    row_ids: list[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]
    size_ids: Tensor
    probability: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(B, k)."""
        return self.latents.shape[0], self.latents.shape[1]


class RowStream:
    """The endless, randomly accessible order of examples.

    Args:
        buckets: latent (h, w) of each example; neighbours in the stream share it where possible.
        global_batch: examples per optimizer step over all processes.
        seed: run seed.
    """

    def __init__(self, buckets: Sequence[Bucket], global_batch: int, seed: int) -> None:
        self.buckets, self.global_batch, self.seed = list(buckets), global_batch, seed
        self._order = lru_cache(maxsize=4)(self._epoch_order)

    def step(self, step: int) -> list[Draw]:
        """The global batch of optimizer step ``step`` (from 0)."""
        count = len(self.buckets)
        first = step * self.global_batch
        return [
            Draw(self._order(position // count)[position % count], position // count)
            for position in range(first, first + self.global_batch)
        ]

    def _epoch_order(self, epoch: int) -> list[int]:
        """A permutation in which each bucket's examples come in runs of one global batch."""
        by_bucket: dict[Bucket, list[int]] = defaultdict(list)
        for index in keyed_permutation(len(self.buckets), self.seed, epoch, "order"):
            by_bucket[self.buckets[index]].append(index)
        if len(by_bucket) == 1:
            return next(iter(by_bucket.values()))
        size = self.global_batch
        runs = [rows[i : i + size] for rows in by_bucket.values() for i in range(0, len(rows), size)]
        shuffled = [runs[i] for i in keyed_permutation(len(runs), self.seed, epoch, "runs")]
        shuffled.sort(key=lambda run: len(run) < size)  # the short runs last, so that they do not misalign the others
        return [index for run in shuffled for index in run]


def micro_batches(draws: Sequence[Draw], buckets: Sequence[Bucket], batch_size: int) -> Iterator[list[Draw]]:
    """Cut one process's share of a global batch into forward passes of equal latent shape."""
    by_bucket: dict[Bucket, list[Draw]] = defaultdict(list)
    for draw in draws:
        by_bucket[buckets[draw.example]].append(draw)
    for share in by_bucket.values():
        for i in range(0, len(share), batch_size):
            yield share[i : i + batch_size]


class Collator:
    """Turns draws into batches: looks up the cache and makes every random choice, keyed by row.

    The keys are (seed, epoch, row id, purpose); the candidates of a row are no part of them, so all pairs of a list
    share noise and timestep within an epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoded: EncodedPreferences,
        adapter: PipelineAdapter,
        schedule: NoiseSchedule,
        config: TrainingConfig,
        device: torch.device,
    ) -> None:
        self.examples, self.encoded, self.adapter = examples, encoded, adapter
        self.schedule, self.config, self.device = schedule, config, device
        self.row_ids = encoded.row_ids

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        items = [self._item(draw) for draw in draws]

        def stack(name: str) -> Tensor:
            return torch.stack([item[name] for item in items]).to(self.device)

        names = items[0]["conditioning"].keys()
        return Batch(
            row_ids=[item["row_id"] for item in items],
            latents=stack("latents"),
            noise=stack("noise"),
            timesteps=torch.tensor([item["timestep"] for item in items], device=self.device),
            conditioning={n: torch.stack([i["conditioning"][n] for i in items]).to(self.device) for n in names},
            size_ids=stack("size_ids"),
            probability=torch.tensor([item["probability"] for item in items], device=self.device),
        )

    def _item(self, draw: Draw) -> dict:
        config, example = self.config, self.examples[draw.example]
        row_id = self.row_ids[example.row]
        key = (config.seed, draw.epoch, row_id)
        flip = config.horizontal_flip and keyed_uniform(*key, "flip") < 0.5
        item = self.encoded.example(example.row, example.candidates, flip=flip)
        moments = item["moments"]
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        posterior_noise = keyed_normal(shape, *key, "posterior").expand(len(moments), *shape)
        latents = self.adapter.latents(moments, posterior_noise if config.sample_latents else None)
        dropped = config.caption_dropout > 0 and keyed_uniform(*key, "caption") < config.caption_dropout
        return {
            "row_id": row_id,
            "latents": latents.float(),
            "noise": keyed_normal(shape, *key, "noise").expand(len(moments), *shape),
            "timestep": draw_timestep(
                self.schedule,
                min_timestep=config.min_timestep,
                max_timestep=config.max_timestep,
                timesteps=config.timesteps,
                generator=keyed_generator(*key, "timestep"),
            ),
            "conditioning": self.encoded.unconditional() if dropped else item["conditioning"],
            "size_ids": item["size_ids"],
            "probability": example.probability,
        }

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

from ..randomness import keyed_generator, keyed_normal, keyed_permutation, keyed_uniform

if TYPE_CHECKING:
    from ..data import EncodedPreferences, Example
    from ..pipelines import PipelineAdapter
    from .config import PreferenceConfig
    from .noise_levels import TimestepSampler

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Draw:
    """One visit of the stream to one example (a pair or a list of a row).

    Args:
        example: index into the run's examples.
        epoch: how often the stream has been through them before.
    """

    example: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """A micro-batch of B prompts with k images each, best image first.

    Args:
        draws: what it was made of.
        row_ids: content hash of each row.
        latents: (B, k, C, h, w) clean scaled latents, fp32.
        noise: (B, k, C, h, w) fp32; the images of a prompt share it unless a method inverts them.
        timesteps: (B,) int64, shared by the images of a prompt.
        conditioning: prompt tensors by name, (B, ...).
        size_ids: (B, k, 6) fp32, see :meth:`PipelineAdapter.predict`.
        probability: (B,) that the first image is the better one: 1, or 1/2 for a tie kept soft.
        preference: (B, k) shares of wins, falling.
    """

    draws: list[Draw]
    row_ids: list[str]
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]
    size_ids: Tensor
    probability: Tensor
    preference: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(B, k)."""
        return self.latents.shape[0], self.latents.shape[1]

    def images(self) -> Images:
        """The N = B k images, those of a prompt side by side."""
        k = self.shape[1]
        return Images(
            latents=self.latents.flatten(0, 1),
            noise=self.noise.flatten(0, 1),
            timesteps=self.timesteps.repeat_interleave(k),
            conditioning={name: value.repeat_interleave(k, 0) for name, value in self.conditioning.items()},
            size_ids=self.size_ids.flatten(0, 1),
        )


@dataclass(frozen=True)
class Images:
    """N noisy images as the denoiser gets them; fields as in :class:`Batch`, one entry per image."""

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    conditioning: dict[str, Tensor]
    size_ids: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: slice | Tensor) -> Images:
        return Images(
            self.latents[rows],
            self.noise[rows],
            self.timesteps[rows],
            {name: value[rows] for name, value in self.conditioning.items()},
            self.size_ids[rows],
        )

    def split(self, count: int) -> Iterator[Images]:
        """Parts of at most ``count`` images, in order."""
        return (self[start : start + count] for start in range(0, len(self), count))


class RowStream:
    """The endless, randomly accessible order of examples.

    Args:
        buckets: shape of each example, (h, w) of its latents and k; neighbours in the stream share it where possible.
        global_batch: examples per optimizer step over all processes.
        seed: run seed.
        stages: with a curriculum, the examples of each stage; each is a stream of its own.
        total_steps: length of the run, which the stages divide equally.
    """

    def __init__(
        self,
        buckets: Sequence[Shape],
        global_batch: int,
        seed: int,
        *,
        stages: Sequence[Sequence[int]] = (),
        total_steps: int = 1,
    ) -> None:
        self.buckets, self.global_batch, self.seed = list(buckets), global_batch, seed
        self.stages = [list(stage) for stage in stages] or [list(range(len(self.buckets)))]
        self.total_steps = total_steps
        self._order = lru_cache(maxsize=4)(self._epoch_order)

    def step(self, step: int) -> list[Draw]:
        """The global batch of optimizer step ``step`` (from 0)."""
        stage = min(step * len(self.stages) // self.total_steps, len(self.stages) - 1)
        first_step = -(-stage * self.total_steps // len(self.stages))
        count = len(self.stages[stage])
        first = (step - first_step) * self.global_batch
        return [
            Draw(self._order(stage, position // count)[position % count], position // count)
            for position in range(first, first + self.global_batch)
        ]

    def _epoch_order(self, stage: int, epoch: int) -> list[int]:
        """A permutation of a stage in which each shape's examples come in runs of one global batch."""
        examples = self.stages[stage]
        by_bucket: dict[Shape, list[int]] = defaultdict(list)
        for place in keyed_permutation(len(examples), self.seed, epoch, "order"):
            by_bucket[self.buckets[examples[place]]].append(examples[place])
        if len(by_bucket) == 1:
            return next(iter(by_bucket.values()))
        size = self.global_batch
        runs = [rows[i : i + size] for rows in by_bucket.values() for i in range(0, len(rows), size)]
        shuffled = [runs[i] for i in keyed_permutation(len(runs), self.seed, epoch, "runs")]
        shuffled.sort(key=lambda run: len(run) < size)  # the short runs last, so that they do not misalign the others
        return [index for run in shuffled for index in run]


def micro_batches(draws: Sequence[Draw], buckets: Sequence[Shape], batch_size: int) -> Iterator[list[Draw]]:
    """Cut one process's share of a global batch into forward passes of equal latent shape."""
    by_bucket: dict[Shape, list[Draw]] = defaultdict(list)
    for draw in draws:
        by_bucket[buckets[draw.example]].append(draw)
    for share in by_bucket.values():
        for i in range(0, len(share), batch_size):
            yield share[i : i + batch_size]


class Collator:
    """Turns draws into batches: looks up the cache and makes every random choice, keyed by row.

    The keys are (seed, visit, row id, purpose), the visit being the epoch, or with ``draws_per_row=m`` its remainder
    by m. The candidates of a row are no part of them, so all pairs of a list share noise and timestep within an epoch.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        encoded: EncodedPreferences,
        adapter: PipelineAdapter,
        timesteps: TimestepSampler,
        config: PreferenceConfig,
        device: torch.device,
    ) -> None:
        self.examples, self.encoded, self.adapter = examples, encoded, adapter
        self.draws_per_row = config.draws_per_row or config.precompute_reference
        self.timesteps, self.config, self.device = timesteps, config, device
        self.row_ids = encoded.row_ids

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        items = [self._item(draw) for draw in draws]

        def stack(name: str) -> Tensor:
            return torch.stack([item[name] for item in items]).to(self.device)

        names = items[0]["conditioning"].keys()
        return Batch(
            draws=list(draws),
            row_ids=[item["row_id"] for item in items],
            latents=stack("latents"),
            noise=stack("noise"),
            timesteps=torch.tensor([item["timestep"] for item in items], device=self.device),
            conditioning={n: torch.stack([i["conditioning"][n] for i in items]).to(self.device) for n in names},
            size_ids=stack("size_ids"),
            probability=torch.tensor([item["probability"] for item in items], device=self.device),
            preference=torch.tensor([item["preference"] for item in items], device=self.device),
        )

    def visit(self, draw: Draw) -> int:
        """Which of a row's keyed draws a visit uses."""
        return draw.epoch if self.draws_per_row is None else draw.epoch % self.draws_per_row

    def _item(self, draw: Draw) -> dict:
        config, example = self.config, self.examples[draw.example]
        row_id = self.row_ids[example.row]
        key = (config.seed, self.visit(draw), row_id)
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
            "timestep": self.timesteps.draw(
                keyed_generator(*key, "timestep"), shift=self.adapter.time_shift((shape[1], shape[2]))
            ),
            "conditioning": self.encoded.unconditional() if dropped else item["conditioning"],
            "size_ids": item["size_ids"],
            "probability": example.probability,
            "preference": example.preference,
        }

"""SmPO: pairs with soft labels, noised by inverting their images."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Example, select_pairs, soften
from ..data.cache import TensorCache
from ..diffusion import invert
from ..errors import DivergenceError
from ..objectives import LossOutput, smpo_loss, with_sft
from .base import PreferenceTrainer
from .batches import Batch, Images
from .config import SmPOConfig
from .policy import DTYPES
from .reference import without_dropout

log = logging.getLogger(__name__)


class SmPOTrainer(PreferenceTrainer):
    """Trains on pairs with :func:`diffalign.objectives.smpo_loss` (SmPO-Diffusion, arXiv:2506.02698).

    Its noise is found, not drawn: each image is inverted to the pair's timestep, and the noise that the way there
    implies takes the place of the random one. Inversions by the reference are kept in the cache by content (image,
    timestep, prompt, noise of the VAE's posterior) in runs that need them again: where an image is in several pairs,
    where draws return (``draws_per_row``, ``precompute_reference``), and where there are few timesteps
    (``inversion_buckets``). A bucket's pairs are trained at its middle, to which their images were inverted, and not
    at a timestep nearby.
    """

    method = "smpo"
    config_class = SmPOConfig
    config: SmPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.inversions: TensorCache | None = None
        super().__init__(*args, **kwargs)

    def train(self) -> dict[str, Any]:
        try:
            return super().train()
        finally:
            if self.inversions is not None:
                self.inversions.flush()

    def select_examples(self) -> tuple[list[Example], dict[str, int]]:
        config = self.config
        examples, counts = select_pairs(
            self.dataset, pairs=config.pairs, min_margin=config.min_margin, ties=config.ties
        )
        if config.score is None:
            return examples, counts
        low, high = config.score_range or self.dataset.score_range(config.score)
        soft, more = soften(examples, self.dataset, config.score, (low, high), contradiction=config.contradiction)
        return soft, counts | more

    def noised(self, batch: Batch) -> Batch:
        if self.config.inversion_steps == 0:
            return batch
        batch = replace(batch, timesteps=self._bucketed(batch.timesteps))
        images, device = batch.images(), batch.noise.device
        cache, keys = self._cache() if self.comes_again else None, _keys(images)
        # by key, so that an image of several pairs is inverted once
        missing = {key: i for i, key in enumerate(keys) if cache is None or key not in cache}
        found: dict[str, Tensor] = {}
        if missing:
            places = torch.tensor([*missing.values()], device=device)
            found = dict(zip(missing, self._invert(images[places]), strict=True))
        if cache is not None:
            fresh = {key: value.to(DTYPES[self.config.cache_dtype]).cpu() for key, value in found.items()}
            cache.put({key: value for key, value in fresh.items() if bool(value.isfinite().all())})
            found = {key: fresh[key] if key in fresh else cache.get(key) for key in keys}
        noise = torch.stack([found[key] for key in keys]).to(device, torch.float32)
        return replace(batch, noise=noise.view(batch.noise.shape))

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        config = self.config
        assert reference_error is not None
        out = smpo_loss(policy_error, reference_error, batch.probability, beta=config.beta, gamma=config.gamma)
        if config.inversion_steps > 0:
            out.stats["noise/std"] = batch.noise.flatten(1).std(1)
        if not config.sft_weight:
            return out
        return with_sft(out, policy_error, config.sft_weight, probability=batch.probability)

    def start(self, total_steps: int) -> None:
        super().start(total_steps)
        config, epochs = self.config, self.total_steps * self.global_batch / len(self.examples)
        inverts = config.inversion_steps > 0 and config.inverter == "reference"
        if inverts and epochs > 1 and not self.comes_again:
            log.warning(
                "each epoch draws other timesteps and VAE noise, so that no inversion is needed twice. None is cached, "
                "and a step costs several of DPO's. draws_per_row=m lets draws return after m epochs; "
                "inversion_buckets=n with sample_latents=false leaves n inversions of an image."
            )
        if self.inversions is not None:  # what other processes inverted for the precomputed reference
            self.inversions.flush()
            self.accelerator.wait_for_everyone()
            self.inversions.refresh()

    def _write_state(self, folder: Path) -> None:
        super()._write_state(folder)
        if self.inversions is not None:  # inverted again, in other company, they would differ in their last bits
            self.inversions.flush()

    @cached_property
    def comes_again(self) -> bool:
        """Whether an inversion of this run can be needed twice; a latent for each image and step is much to keep."""
        config = self.config
        few = not config.sample_latents and (config.inversion_buckets or config.timesteps)
        shared = len({example.row for example in self.examples}) < len(self.examples)  # an image in several pairs
        return config.inverter == "reference" and bool(self.collate.draws_per_row or few or shared)

    def _bucketed(self, timesteps: Tensor) -> Tensor:
        """Middle of each timestep's bucket; the buckets divide what is allowed."""
        config, last = self.config, self.schedule.num_timesteps - 1
        if config.inversion_buckets is None:
            return timesteps
        low, high = config.min_timestep, last if config.max_timestep is None else config.max_timestep
        width = high - low + 1
        count = min(config.inversion_buckets, width)
        return low + (2 * ((timesteps - low) * count // width) + 1) * width // (2 * count)

    def _invert(self, images: Images) -> Tensor:
        """Implied noise (N, C, h, w) of the images; without guidance, each under its own prompt.

        NaN where the network's own output is not finite: so is the loss then, which stops all processes by the rows'
        names and leaves a checkpoint.
        """
        assert self.reference is not None
        by_reference = self.config.inverter == "reference"
        with self.reference.use(self.model) if by_reference else without_dropout(self.denoiser) as module:

            def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
                return self.passes.predict(module, x, images[rows], time)

            run = partial(
                invert,
                predict,
                images.latents,
                images.timesteps,
                self.schedule,
                steps=self.config.inversion_steps,
                renoise=self.config.renoise,
            )
            try:
                return run().noise
            except DivergenceError:
                return run(guard=False).noise

    def _cache(self) -> TensorCache:
        """Inversions by this reference and these settings."""
        if self.inversions is None:
            assert self.reference is not None
            config = self.config
            settings = {"reference": self.reference.identity, "steps": config.inversion_steps}
            settings |= {"renoise": config.renoise, "dtype": config.cache_dtype, "precision": config.mixed_precision}
            settings |= {"reference_dtype": config.reference_dtype, "schedule": self.schedule.identity}
            settings |= {"guidance": getattr(self.adapter, "guidance_embedding", None)}
            name = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
            root = Path(config.cache_dir) if config.cache_dir else self.output_dir / "cache"
            self.inversions = TensorCache(root / f"inversions-{name}", {"kind": "inversions", **settings})
        return self.inversions


def _keys(images: Images) -> list[str]:
    """Hash of everything that an inversion depends on, by image."""
    parts = [images.latents, images.timesteps, images.size_ids, *images.conditioning.values()]
    columns = [part.detach().cpu().contiguous() for part in parts]
    keys = []
    for i in range(len(images)):
        digest = hashlib.blake2b(digest_size=16)
        for column in columns:
            digest.update(column[i].reshape(-1).view(torch.uint8).numpy().data)
        keys.append(digest.hexdigest())
    return keys

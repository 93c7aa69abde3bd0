"""SmPO: pairs with soft labels, noised by inverting their images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Example, select_pairs, soften
from ..data.cache import TensorCache
from ..diffusion import invert
from ..objectives import LossOutput, smpo_loss, with_sft
from .base import PreferenceTrainer
from .batches import Batch, Images
from .config import SmPOConfig
from .policy import DTYPES


class SmPOTrainer(PreferenceTrainer):
    """Trains on pairs with :func:`diffalign.objectives.smpo_loss` (SmPO-Diffusion, arXiv:2506.02698).

    Its noise is found, not drawn: each image is inverted to the pair's timestep, and the noise that the way there
    implies takes the place of the random one. Inversions by the reference are kept in the cache by content (image,
    timestep, prompt, noise of the VAE's posterior), so that a draw that comes again costs nothing: see
    ``draws_per_row``, ``precompute_reference`` and ``timesteps``.
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
        images, device = batch.images(), batch.noise.device
        if self.config.inverter == "policy":
            return replace(batch, noise=self._invert(images).view(batch.noise.shape))
        cache, keys = self._cache(), _keys(images)
        missing = [i for i, key in enumerate(keys) if key not in cache]
        if missing:
            noise = self._invert(images[torch.tensor(missing, device=device)]).to(DTYPES[self.config.cache_dtype])
            cache.put({keys[i]: value.cpu() for i, value in zip(missing, noise, strict=True)})
        noise = torch.stack([cache.get(key) for key in keys]).to(device, torch.float32)
        return replace(batch, noise=noise.view(batch.noise.shape))

    def compute(self, policy_error: Tensor, reference_error: Tensor | None, batch: Batch) -> LossOutput:
        config = self.config
        assert reference_error is not None
        out = smpo_loss(policy_error, reference_error, batch.probability, beta=config.beta, gamma=config.gamma)
        return with_sft(out, policy_error, config.sft_weight) if config.sft_weight else out

    def start(self, total_steps: int) -> None:
        super().start(total_steps)
        if self.inversions is not None:  # what other processes inverted for the precomputed reference
            self.inversions.flush()
            self.accelerator.wait_for_everyone()
            self.inversions.refresh()

    def _invert(self, images: Images) -> Tensor:
        """Implied noise (N, C, h, w) of the images; without guidance, each under its own prompt."""
        assert self.reference is not None
        with self.reference.use(self.model) if self.config.inverter == "reference" else self._still() as module:

            def predict(x: Tensor, time: Tensor, rows: Tensor) -> Tensor:
                return self.passes.predict(module, x, images[rows], time)

            found = invert(
                predict,
                images.latents,
                images.timesteps,
                self.schedule,
                steps=self.config.inversion_steps,
                renoise=self.config.renoise,
            )
        return found.noise

    @contextmanager
    def _still(self) -> Iterator[nn.Module]:
        """The policy without dropout."""
        self.denoiser.eval()
        try:
            yield self.denoiser
        finally:
            self.denoiser.train()

    def _cache(self) -> TensorCache:
        """Inversions by this reference and these settings."""
        if self.inversions is None:
            assert self.reference is not None
            config = self.config
            settings = {"reference": self.reference.identity, "steps": config.inversion_steps}
            settings |= {"renoise": config.renoise, "dtype": config.cache_dtype, "precision": config.mixed_precision}
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

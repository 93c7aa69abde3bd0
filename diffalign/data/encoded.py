"""Rows as the training loop reads them: VAE moments and prompt embeddings, made once and kept in a folder.

    <folder>/rows-<dataset>-<block>.npz      what each row is made of (hashes, sizes)
    <folder>/latents-<VAE>-<precision>/      moments by image, shape and crop
    <folder>/prompts-<text encoders>/        embeddings by prompt, and of the empty branch

Images are found by the hash of their bytes, prompts by that of their text, both under the hash of the encoder: tables
that share pictures share the cache, and another VAE never meets the latents of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..randomness import keyed_uniform
from .cache import TensorCache, read_manifest
from .encoding import UNCONDITIONAL, Share, chosen_candidates, fill_latents, fill_prompts, prompt_names, view_key
from .files import remove_stale
from .geometry import CENTRE, Geometry, plan
from .pairs import Example
from .preferences import PreferenceDataset
from .rows import RowIndex, index_rows, prompt_hash

if TYPE_CHECKING:
    from ..pipelines import PipelineAdapter
    from ..trainers.config import PreferenceConfig


class EncodedPreferences:
    """A preference dataset, encoded. Made by :meth:`build`.

    Args:
        index: what each row is made of.
        geometry: shape and crops of a row.
        latents: cache of moments.
        prompts: cache of embeddings.
        cell: pixels per latent cell.
        flips: whether mirrored images are cached too.
    """

    def __init__(
        self,
        index: RowIndex,
        geometry: Callable[[int], Geometry],
        latents: TensorCache,
        prompts: TensorCache,
        *,
        cell: int,
        flips: bool,
    ) -> None:
        self.index, self.row_ids = index, index.row_ids.tolist()
        self.latents, self.prompts, self.cell, self.flips = latents, prompts, cell, flips
        self.geometry = geometry
        self._names = prompt_names(prompts)
        self._unconditional = self._prompt_tensors(UNCONDITIONAL)

    def __len__(self) -> int:
        return len(self.row_ids)

    @classmethod
    def build(
        cls,
        dataset: PreferenceDataset,
        adapter: PipelineAdapter,
        config: PreferenceConfig,
        *,
        folder: str | Path,
        process_index: int = 0,
        num_processes: int = 1,
        barrier: Callable[[], None] = lambda: None,
        device: torch.device | str = "cpu",
        extra_prompts: Sequence[str] = (),
        examples: Iterable[Example] | None = None,
    ) -> EncodedPreferences:
        """Encode what is not in the folder yet, then open it.

        Args:
            dataset: the rows.
            adapter: its encoders are needed, and moved to ``device``, only when something is missing.
            config: `resolution`, `aspect_buckets`, `random_crop`, `horizontal_flip`, `cache_dtype`, `vae_dtype`,
                `encode_batch_size`, `seed` and `progress_bar` are read.
            folder: the cache.
            process_index: this process.
            num_processes: how many share the work; each writes its own shards.
            barrier: waits for all of them.
            device: where to encode.
            extra_prompts: prompts that are not in the table, for validation images.
            examples: encode only the candidates that these compare; None encodes all.

        Returns:
            The encoded rows, the same for every number of processes.

        Raises:
            DataError: an image cannot be used, something is missing while its encoder is not loaded, the encoder gives
                numbers that are not finite, or the disk is full. Names the row.
            ConfigError: the resolution does not fit the model.
        """
        folder = Path(folder)
        cell = adapter.vae_scale_factor
        share = Share(process_index, num_processes, barrier, config.progress_bar and process_index == 0)
        index = index_rows(
            dataset,
            folder,
            process_index=process_index,
            num_processes=num_processes,
            barrier=barrier,
            progress=share.progress,
        )
        geometry = lru_cache(maxsize=100_000)(_planner(dataset, index, adapter, config))
        latents, prompts = _open_caches(folder, adapter, config)
        chosen = chosen_candidates(index, examples)
        if process_index == 0:
            remove_stale(folder)
            latents.clean()
            prompts.clean()
        fill_latents(latents, index, geometry, dataset, adapter, config, chosen, share, device)
        fill_prompts(prompts, index, dataset, adapter, config, chosen, extra_prompts, share, device)
        barrier()
        latents.refresh()
        prompts.refresh()
        return cls(index, geometry, latents, prompts, cell=cell, flips=config.horizontal_flip)

    def bucket(self, row: int) -> tuple[int, int]:
        """(h, w) of the row's latents; rows of one bucket can share a batch."""
        height, width = self.geometry(row).bucket
        return height // self.cell, width // self.cell

    def example(self, row: int, candidates: Sequence[int], *, flip: bool = False) -> dict[str, Any]:
        """What one visit of a row needs.

        Args:
            row: index into the dataset.
            candidates: k of its images.
            flip: all of them mirrored; needs ``config.horizontal_flip`` when the cache was built.

        Returns:
            `moments` (k, 2c, h, w) fp32, `size_ids` (k, 6) fp32, `conditioning` tensors by name without a batch axis.
        """
        if flip and not self.flips:
            raise ConfigError("mirrored images were not encoded: set horizontal_flip=true.")
        geometry, hashes = self.geometry(row), self.index.image_hashes(row)
        keys = [view_key(hashes[c], geometry.placements[c], geometry.bucket, flip) for c in candidates]
        return {
            "moments": torch.stack([self.latents.get(key) for key in keys]).float(),
            "size_ids": geometry.size_ids(flip)[list(candidates)],
            "conditioning": self._prompt_tensors(self.index.prompt(row)),
        }

    def unconditional(self) -> dict[str, Tensor]:
        """Tensors of the pipeline's own empty branch, without a batch axis."""
        return dict(self._unconditional)

    def prompt(self, text: str) -> dict[str, Tensor]:
        """Tensors of a prompt of the table or of ``extra_prompts``, without a batch axis.

        Raises:
            DataError: the prompt was never encoded.
        """
        return self._prompt_tensors(prompt_hash(text))

    def _prompt_tensors(self, key: str) -> dict[str, Tensor]:
        return {name: self.prompts.get(f"{key}.{name}").float() for name in self._names}


def _planner(
    dataset: PreferenceDataset, index: RowIndex, adapter: PipelineAdapter, config: PreferenceConfig
) -> Callable[[int], Geometry]:
    resolution = adapter.native_resolution if config.resolution is None else config.resolution
    multiple, cell = adapter.size_multiple, adapter.vae_scale_factor

    def geometry(row: int) -> Geometry:
        position = CENTRE
        if config.random_crop:
            key = (config.seed, str(index.row_ids[row]), "crop")
            position = (keyed_uniform(*key, "top"), keyed_uniform(*key, "left"))
        return plan(
            index.image_sizes(row),
            resolution,
            multiple=multiple,
            aspect_buckets=config.aspect_buckets,
            crop_position=position,
            cell=cell,
            where=f"{dataset.name}, row {dataset.number(row)}",
        )

    return geometry


def _open_caches(folder: Path, adapter: PipelineAdapter, config: PreferenceConfig) -> tuple[TensorCache, TensorCache]:
    identity = adapter.encoder_identity()
    latents = _open(folder, "latents", identity["vae"], config.cache_dtype, "the VAE")
    prompts = _open(folder, "prompts", identity["text"], adapter.family, "the text encoders")
    return latents, prompts


def _open(folder: Path, kind: str, encoder: str | None, variant: str, what: str) -> TensorCache:
    """The cache of an encoder; of an encoder that is not loaded, the only one there is."""
    if encoder is not None:
        place = folder / f"{kind}-{encoder[:16]}-{variant}"
        return TensorCache(place, {"kind": kind, "encoder": encoder, "variant": variant})
    found = sorted(path.parent for path in folder.glob(f"{kind}-*-{variant}/manifest.json"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(
            f"{what}: not loaded, and {folder} holds {len(found)} caches of its {kind} ({names}), so it cannot be told "
            "which to read. Load the whole pipeline, or keep exactly one."
        )
    recorded = read_manifest(found[0] / "manifest.json").get("encoder")
    return TensorCache(found[0], {"kind": kind, "encoder": recorded, "variant": variant})

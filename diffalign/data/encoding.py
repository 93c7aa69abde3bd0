"""Filling the caches: what is missing is encoded, each process its share of whole batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError
from .cache import TensorCache, as_exact_half
from .geometry import Geometry, Placement, Size, apply
from .images import decode_image
from .pairs import Example
from .preferences import PreferenceDataset
from .rows import RowIndex, prompt_hash, short_hash

if TYPE_CHECKING:
    from ..pipelines import PipelineAdapter
    from ..trainers.config import PreferenceConfig

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class View:
    """One image as it is encoded: which, where cropped, and whether mirrored."""

    key: str
    row: int
    image: int
    place: Placement
    bucket: Size
    flip: bool


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's."""

    index: int
    count: int
    barrier: Callable[[], None]
    progress: bool

    def chunks(self, items: Sequence[Any], size: int, label: str) -> Iterator[Sequence[Any]]:
        """Every ``count``-th chunk of ``size`` items.

        What is in a chunk depends on the items alone, so that an encoder whose last bits depend on its batch gives the
        same for every number of processes.
        """
        starts = range(self.index * size, len(items), self.count * size)
        for start in tqdm(starts, desc=label, disable=not self.progress, leave=False):
            yield items[start : start + size]


def chosen_candidates(index: RowIndex, examples: Iterable[Example] | None) -> dict[int, list[int]]:
    """The candidates to encode of each row, in order."""
    if examples is None:
        return {row: list(range(len(index.image_hashes(row)))) for row in range(len(index))}
    chosen: dict[int, set[int]] = {}
    for example in examples:
        chosen.setdefault(example.row, set()).update(example.candidates)
    return {row: sorted(chosen[row]) for row in sorted(chosen)}


def view_key(image: str, place: Placement, bucket: Size, flip: bool) -> str:
    return f"{image}-{short_hash(place, bucket)}{'-flip' if flip else ''}"


def _views(
    index: RowIndex, geometry: Callable[[int], Geometry], chosen: dict[int, list[int]], *, flips: bool
) -> dict[Size, list[View]]:
    """Every image to encode, once, by the shape it is encoded in."""
    views: dict[str, View] = {}
    for row, images in chosen.items():
        planned, hashes = geometry(row), index.image_hashes(row)
        for image in images:
            for flip in (False, True) if flips else (False,):
                place = planned.placements[image]
                key = view_key(hashes[image], place, planned.bucket, flip)
                views.setdefault(key, View(key, row, image, place, planned.bucket, flip))
    shapes: dict[Size, list[View]] = {}
    for view in views.values():
        shapes.setdefault(view.bucket, []).append(view)
    return shapes


def fill_latents(
    cache: TensorCache,
    index: RowIndex,
    geometry: Callable[[int], Geometry],
    dataset: PreferenceDataset,
    adapter: PipelineAdapter,
    config: PreferenceConfig,
    chosen: dict[int, list[int]],
    share: Share,
    device: torch.device | str,
) -> None:
    """Encode this process's share of the images that are missing."""
    dtype = DTYPES[config.cache_dtype]
    shapes = _views(index, geometry, chosen, flips=config.horizontal_flip)
    missing = sum(view.key not in cache for views in shapes.values() for view in views)
    if not missing:
        return
    if adapter.encoder_identity()["vae"] is None or adapter.pipeline.vae is None:
        raise DataError(
            f"{missing} images are not in {cache.folder}, and the VAE is not loaded. Load the whole pipeline."
        )
    adapter.move_encoders(device)
    row_of = lru_cache(maxsize=4)(dataset.__getitem__)
    for bucket, views in shapes.items():
        for chunk in share.chunks(views, config.encode_batch_size, f"Encoding images {bucket[0]}x{bucket[1]}"):
            if all(view.key in cache for view in chunk):
                continue
            pixels = []
            for view in chunk:
                row = row_of(view.row)
                picture = decode_image(
                    row.image_bytes[view.image], f"{dataset.name}, {row.where}, images[{view.image}]"
                )
                pixels.append(apply(picture, view.place, bucket, flip=view.flip))
            moments = adapter.encode_images(torch.stack(pixels)).to(dtype)
            for view, moment in zip(chunk, moments, strict=True):
                if not torch.isfinite(moment).all():
                    raise DataError(
                        f"{dataset.name}, row {dataset.number(view.row)}, images[{view.image}]: its latents are not "
                        f"finite in vae_dtype={config.vae_dtype}, cache_dtype={config.cache_dtype}. Use fp32 for both."
                    )
            cache.put({view.key: moment for view, moment in zip(chunk, moments, strict=True) if view.key not in cache})
    cache.flush()


def prompt_names(cache: TensorCache) -> list[str]:
    """Names of the tensors that make up a prompt; none as long as the empty branch is not stored."""
    prefix = f"{UNCONDITIONAL}."
    return sorted(key.removeprefix(prefix) for key in cache if key.startswith(prefix))


def fill_prompts(
    cache: TensorCache,
    index: RowIndex,
    dataset: PreferenceDataset,
    adapter: PipelineAdapter,
    config: PreferenceConfig,
    chosen: dict[int, list[int]],
    extra_prompts: Sequence[str],
    share: Share,
    device: torch.device | str,
) -> None:
    """Encode this process's share of the prompts that are missing; the first one also the empty branch.

    Raises:
        DataError: the text encoders are needed and not loaded, or give numbers that are not finite for a prompt.
    """
    first_row: dict[str, int] = {}
    for row in chosen:
        first_row.setdefault(index.prompt(row), row)
    extra = {prompt_hash(text): text for text in extra_prompts}
    wanted = list(dict.fromkeys([*first_row, *extra]))
    names = prompt_names(cache)

    def is_missing(key: str) -> bool:
        return not names or any(f"{key}.{name}" not in cache for name in names)

    missing = [key for key in wanted if is_missing(key)]
    if not missing and names:
        return
    if adapter.encoder_identity()["text"] is None or not adapter.text_encoders:
        raise DataError(
            f"{len(missing)} prompts are not in {cache.folder}, and the text encoders are not loaded. Load the whole "
            "pipeline."
        )
    adapter.move_encoders(device)
    if share.index == 0 and not names:
        cache.put(_as_entries(UNCONDITIONAL, adapter.unconditional(), "the empty prompt"))
    texts = {key: extra[key] if key in extra else dataset.prompt(first_row[key]) for key in missing}
    warn_of_cut_prompts(adapter, texts.values() if share.index == 0 else ())
    for chunk in share.chunks(wanted, config.encode_batch_size, "Encoding prompts"):
        if not any(key in texts for key in chunk):
            continue
        prompts = [extra[key] if key in extra else dataset.prompt(first_row[key]) for key in chunk]
        tensors = adapter.encode_prompts(prompts)
        for number, key in enumerate(chunk):
            if key in texts:
                own = {name: tensor[number : number + 1] for name, tensor in tensors.items()}
                cache.put(_as_entries(key, own, f"the prompt {texts[key]!r:.80}"))
    cache.flush()


def _as_entries(key: str, tensors: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """What is stored of one prompt, from tensors (1, ...).

    Raises:
        DataError: a number in them is not finite; ``what`` names the prompt.
    """
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise DataError(f"{what}: its embedding is not finite. Load the text encoders in fp32 or bf16, or remove it.")
    return {f"{key}.{name}": as_exact_half(tensor[0]) for name, tensor in tensors.items()}


def warn_of_cut_prompts(adapter: PipelineAdapter, prompts: Iterable[str]) -> None:
    """Say once how many prompts are longer than the text encoder reads."""
    tokenizer, limit = adapter.prompt_reader
    if tokenizer is None:
        return
    cut = [text for text in prompts if len(tokenizer(text, truncation=False, verbose=False)["input_ids"]) > limit]
    if cut:
        log.warning(
            "%d prompts are longer than the %d tokens that the text encoder reads; their rest is cut off (the first: "
            "%.60s...)",
            len(cut),
            limit,
            cut[0],
        )

"""Drawing the pictures of a comparison, and finding those that an earlier run has drawn.

A picture on disk says in its PNG header how it was made. It is used again only when all of that is equal: prompt, seed,
weights, sampler, settings and versions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image, PngImagePlugin
from torch import nn
from tqdm.auto import tqdm

from ..data.files import atomic_file
from ..pipelines import adapter_for
from ..pipelines.identity import add_weights
from ..synthesis.sampling import iterate_images

Picture = Image.Image | Path

_HEADER = "diffalign"  # name of the PNG text chunk
_VERSIONS = ("diffalign", "diffusers", "torch", "transformers")


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn; the same for all models.

    Args:
        steps: sampling steps.
        guidance: classifier-free guidance scale.
        batch_size: pictures drawn at once; never changes a picture.
        height: pixels; None takes the model's own.
        width: pixels; None takes the model's own.
    """

    steps: int = 25
    guidance: float = 5.0
    batch_size: int = 16
    height: int | None = None
    width: int | None = None


def draw(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingSettings,
    folder: Path | None = None,
    *,
    identity: str | None = None,
    progress: bool = False,
) -> list[Picture]:
    """Every prompt with every seed, in memory or as PNG files ``<prompt number>-<seed>.png`` in ``folder``.

    Args:
        pipeline: with all its adapters switched on.
        prompts: P prompts.
        seeds: S seeds; they run fastest in the result.
        sampling: how pictures are drawn.
        folder: where to; None keeps them in memory.
        identity: of the model (:func:`pipeline_identity`); pictures that the same model has drawn with the same
            settings are then not drawn again. None draws all.
        progress: show a progress bar.
    """
    pairs = cross(prompts, seeds)
    if folder is None:
        return list(_batches(pipeline, pairs, sampling, progress))
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(prompts) - 1))
    files = [folder / f"{i // len(seeds):0{digits}d}-{seed}.png" for i, (_, seed) in enumerate(pairs)]
    headers = [_header(pipeline, prompt, seed, sampling, identity) for prompt, seed in pairs]
    todo = [
        i for i, file in enumerate(files) if identity is None or not _is_drawn(file, headers[i])
    ]  # fmt: skip
    for i, image in zip(todo, _batches(pipeline, [pairs[i] for i in todo], sampling, progress), strict=True):
        _save(image, files[i], headers[i])
    return list(files)


def cross(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """All (prompt, seed), seeds running fastest."""
    return [(prompt, seed) for prompt in prompts for seed in seeds]


def open_picture(picture: Picture) -> Image.Image:
    """The picture as RGB."""
    return (picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB")


def pipeline_identity(pipeline: DiffusionPipeline) -> str:
    """Hash of everything in a pipeline that decides its pictures: weights, their precision, configurations, sampler."""
    digest = hashlib.blake2b(digest_size=16)
    for name, part in sorted(pipeline.components.items()):
        config: Any = getattr(part, "config", None) or {}
        items = dict(config.to_dict() if hasattr(config, "to_dict") else config)
        kept = {key: value for key, value in items.items() if not key.startswith("_") and "version" not in key}
        digest.update(f"{name} {type(part).__name__} {json.dumps(kept, sort_keys=True, default=str)}".encode())
        if isinstance(part, nn.Module):
            add_weights(digest, part)
    return digest.hexdigest()


def path_identity(path: str | Path) -> str | None:
    """Hash of a file, or of all weights and configurations in a folder; None for what is not on this disk."""
    path = Path(path)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".json"))
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.relative_to(path) if path.is_dir() else ''}".encode())
            digest.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
    return digest.hexdigest()


def _batches(
    pipeline: DiffusionPipeline, pairs: Sequence[tuple[str, int]], sampling: SamplingSettings, progress: bool
) -> Any:
    if not pairs:
        return
    settings = asdict(sampling)
    batches = iterate_images(pipeline, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], **settings)
    with tqdm(total=len(pairs), desc="pictures", unit="image", disable=not progress) as bar:
        for batch in batches:
            yield from batch
            bar.update(len(batch))


def _header(
    pipeline: DiffusionPipeline, prompt: str, seed: int, sampling: SamplingSettings, identity: str | None
) -> str:
    settings = {key: value for key, value in asdict(sampling).items() if key != "batch_size"}
    device = adapter_for(pipeline).denoiser.device.type  # another device rounds differently
    made = {"prompt": prompt, "seed": seed, "model": identity, **settings, "device": device}
    return json.dumps(made | {"versions": {name: version(name) for name in _VERSIONS}}, ensure_ascii=False)


def _is_drawn(file: Path, header: str) -> bool:
    try:
        with Image.open(file) as image:
            image.load()  # a damaged picture is drawn again
            return image.info.get(_HEADER) == header
    except (OSError, SyntaxError):  # Pillow's word for a broken PNG
        return False


def _save(image: Image.Image, file: Path, header: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt(_HEADER, header)
    with atomic_file(file) as stream:
        image.save(stream, format="PNG", pnginfo=info)

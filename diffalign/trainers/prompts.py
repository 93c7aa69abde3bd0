"""Prompts as training data, for methods that draw their own pictures: a list, and its embeddings on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.cache import TensorCache, as_exact_half
from ..data.rows import prompt_hash
from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ..pipelines import PipelineAdapter

#: Captions of the shapes world that name no held-out combination; none of an evaluation's seeds.
SHAPES_TRAIN = "shapes:train"
_SHAPES_COUNT, _SHAPES_SEED = 4000, 71_003
_UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class Prompts:
    """What is trained on.

    Args:
        texts: prompts, none of them twice.
        name: where they come from, for reports.
    """

    texts: list[str]
    name: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def identity(self) -> str:
        """Hash of the prompts in their order."""
        return hashlib.blake2b("\n".join(self.texts).encode(), digest_size=8).hexdigest()


def load_prompts(source: Prompts | str | Path | Sequence[str], **options: Any) -> Prompts:
    """Read prompts to train on.

    Args:
        source: a list of prompts; a file (.txt with a prompt a line, .jsonl, .json); ``shapes:train``, 4000 captions of
            the shapes world; or whatever else :func:`diffalign.evaluation.prompts.read_prompts` accepts.
        options: settings of a job that only tables know; refused unless they are the defaults.

    Raises:
        ConfigError: no such file or set, or a table's setting that would have no effect.
        DataError: no prompts in it.
    """
    from ..evaluation.prompts import read_prompts
    from ..shapes import sample_captions

    idle = {"split": "train", "revision": None, "score": None, "bad_rows": "error"}
    for name, value in options.items():
        if value != idle[name]:
            key = name if name == "bad_rows" else f"dataset_{name}"
            raise ConfigError(f"{key}={value} has no effect on a list of prompts: leave it out.")
    if isinstance(source, Prompts):
        return source
    if source == SHAPES_TRAIN:
        return Prompts(sample_captions(_SHAPES_COUNT, _SHAPES_SEED), SHAPES_TRAIN)
    return Prompts(read_prompts(source), str(source) if isinstance(source, (str, Path)) else "a list of prompts")


class EncodedPrompts:
    """Embeddings of prompts and of the empty branch, encoded once and kept on disk.

    Args:
        cache: where they are, complete.
    """

    def __init__(self, cache: TensorCache) -> None:
        self.cache = cache
        prefix = f"{_UNCONDITIONAL}."
        self.names = sorted(key.removeprefix(prefix) for key in cache if key.startswith(prefix))

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        adapter: PipelineAdapter,
        folder: Path,
        accelerator: Accelerator,
        *,
        batch_size: int = 8,
        progress: bool = False,
    ) -> EncodedPrompts:
        """Encode what the folder does not hold yet; each process its share of whole batches.

        Args:
            texts: prompts, those of validation and hold-outs included.
            adapter: its text encoders are moved to the accelerator's device only when something is missing.
            folder: of all caches of the run.
            accelerator: processes share the work.
            batch_size: prompts encoded at once.
            progress: show a bar.

        Raises:
            DataError: prompts are missing and the text encoders are not loaded.
        """
        encoder = adapter.encoder_identity()["text"]
        if encoder is None or not adapter.text_encoders:
            raise DataError("prompts cannot be encoded: the text encoders are not loaded. Load the whole pipeline.")
        manifest = {"kind": "prompts", "encoder": encoder, "variant": adapter.family}
        cache = TensorCache(folder / f"prompts-{encoder[:16]}-{adapter.family}", manifest)
        wanted = list(dict.fromkeys(texts))
        first = next(iter(cls(cache).names), None)
        if first is None or any(f"{prompt_hash(text)}.{first}" not in cache for text in wanted):
            adapter.move_encoders(accelerator.device)
            if accelerator.is_main_process:
                cache.put(_entries(_UNCONDITIONAL, adapter.unconditional()))
            mine = range(accelerator.process_index * batch_size, len(wanted), accelerator.num_processes * batch_size)
            for start in tqdm(mine, desc="Encoding prompts", disable=not progress, leave=False):
                chunk = wanted[start : start + batch_size]
                tensors = adapter.encode_prompts(chunk)
                for i, text in enumerate(chunk):
                    cache.put(_entries(prompt_hash(text), {name: value[i : i + 1] for name, value in tensors.items()}))
            cache.flush()
        accelerator.wait_for_everyone()
        cache.refresh()
        return cls(cache)

    def prompt(self, text: str) -> dict[str, Tensor]:
        """Tensors of one prompt, fp32, without a batch axis."""
        return self._tensors(prompt_hash(text))

    def unconditional(self) -> dict[str, Tensor]:
        """Those of the pipeline's own empty branch."""
        return self._tensors(_UNCONDITIONAL)

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors (N, ...) of N prompts."""
        rows = [self.prompt(text) for text in texts]
        return {name: torch.stack([row[name] for row in rows]) for name in self.names}

    def _tensors(self, key: str) -> dict[str, Tensor]:
        return {name: self.cache.get(f"{key}.{name}").float() for name in self.names}


def _entries(key: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{key}.{name}": as_exact_half(value[0]) for name, value in tensors.items()}

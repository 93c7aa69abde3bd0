"""Content hashes of encoders: what a cache was made with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Fields that every transformers configuration has say nothing about this encoder (where it came from, which version
# wrote it, its precision, which the weights show); but CLIP pools at its end token.
_INCIDENTAL = set(PretrainedConfig().to_dict()) - {"bos_token_id", "eos_token_id", "pad_token_id"}


def vae_identity(vae: ModelMixin, dtype: torch.dtype) -> str:
    """Hash of a VAE's weights and configuration, and of the precision it is run in."""
    digest = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    _add_json(digest, {"config": config, "run_in": str(dtype)})
    add_weights(digest, vae)
    return digest.hexdigest()


def text_identity(
    encoders: Sequence[PreTrainedModel],
    tokenizers: Sequence[PreTrainedTokenizerBase | None],
    flags: Mapping[str, bool | int],
) -> str:
    """Hash of text encoders (weights and configurations), tokenizers and whatever else decides a prompt's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    _add_json(digest, dict(flags))
    for encoder in encoders:
        _add_json(digest, {k: v for k, v in encoder.config.to_dict().items() if k not in _INCIDENTAL})
        add_weights(digest, encoder)
    for tokenizer in tokenizers:
        if tokenizer is not None:
            _add_json(digest, _tokenizer(tokenizer))
    return digest.hexdigest()


def _tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides how text becomes ids."""
    said: dict[str, Any] = {"length": tokenizer.model_max_length, "special": tokenizer.special_tokens_map}
    if not tokenizer.is_fast:
        return said | {"vocab": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("truncation", "padding"):  # left over from the last call
        backend.pop(name, None)
    return said | {"backend": backend}


def _add_json(digest: Any, value: Any) -> None:
    digest.update(json.dumps(value, sort_keys=True, default=str).encode())


def add_weights(digest: Any, module: nn.Module) -> None:
    """Add names, types, shapes and bytes of a module's weights to a hash."""
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))

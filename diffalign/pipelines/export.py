"""Trained weights in the forms other programs read. Files appear whole or not at all."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .base import Denoiser, PipelineAdapter
from .names import Original

log = logging.getLogger(__name__)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
KOHYA_FILE = "kohya_comfyui_lora.safetensors"
# What a reader needs to rebuild the adapter, and no more: older versions of peft refuse fields they do not know.
_LORA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")


def save_lora(
    adapter: PipelineAdapter, folder: str | Path, *, denoiser: nn.Module | None = None, adapter_name: str = "default"
) -> list[Path]:
    """Write an adapter for diffusers and, beside it, for kohya's tools and ComfyUI.

    ``pipeline.load_lora_weights(folder)`` reads the first file. The second is named as each family is by kohya: SDXL,
    SD3 and FLUX by the original code's modules, SD by diffusers' (ComfyUI reads both). diffusers reads it back for SD,
    SDXL and FLUX (without DoRA there); it has no reader for SD3's. DoRA has no agreed meaning in that format (readers
    disagree on which norm divides); its magnitudes are written so that ComfyUI's formula gives our weights.

    Args:
        adapter: whose denoiser was trained.
        folder: created when missing; other files in it are left alone.
        denoiser: the trained network when it is not ``adapter.denoiser`` itself.
        adapter_name: peft's name of the adapter.

    Returns:
        The files: diffusers' first, then kohya's where the family has such a format.

    Raises:
        ConfigError: the network carries no such adapter.
        CheckpointError: the disk refused (full, for example); existing files are untouched.
    """
    network = adapter.denoiser if denoiser is None else denoiser
    peft_config = getattr(network, "peft_config", {}).get(adapter_name)
    if peft_config is None:
        raise ConfigError(
            f"the denoiser carries no adapter named {adapter_name!r}; use save_pipeline for full weights."
        )
    folder = Path(folder)
    # In peft's own names throughout: diffusers' older ones exist for attention layers alone, and its reader judges a
    # file by its first key, so that a mixture loses layers without an error.
    layers = get_peft_model_state_dict(network, adapter_name=adapter_name)
    layers = {name: _resting(tensor) for name, tensor in layers.items()}
    metadata = {name: getattr(peft_config, name) for name in _LORA_FIELDS}
    metadata["target_modules"] = sorted(_lora_layers(network, adapter_name))
    with _staging(folder) as staging:
        type(adapter.pipeline).save_lora_weights(
            staging,
            **{f"{adapter.denoiser_name}_lora_layers": layers},
            **{f"{adapter.denoiser_name}_lora_adapter_metadata": metadata},
        )
        written = [DIFFUSERS_FILE]
        if adapter.kohya_network is not None:
            tensors, header = kohya_state_dict(adapter, network, adapter_name)
            save_file(tensors, staging / KOHYA_FILE, metadata=header)
            written.append(KOHYA_FILE)
        for name in written:
            _sync(staging / name)
            (staging / name).replace(folder / name)
    return [folder / name for name in written]


def kohya_state_dict(
    adapter: PipelineAdapter, network: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors in the kohya/ComfyUI naming, and the file's header.

    Where the original network keeps several of our layers in one matrix (q, k and v of the transformers), their
    adapters become one of the sum of their ranks, whose ``lora_up`` is block diagonal.

    Args:
        adapter: tells the family.
        network: a denoiser with the adapter ``adapter_name``.
        adapter_name: peft's name of the adapter.

    Returns:
        ``lora_unet_<module>.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` and, for DoRA, ``.dora_scale``.

    Raises:
        KeyError: an adapted module does not exist in the original network.
    """
    tensors: dict[str, Tensor] = {}
    layers = _lora_layers(network, adapter_name)
    ranks = {name: layer.lora_A[adapter_name].weight.shape[0] for name, layer in layers.items()}
    # Readers scale by alpha / rank, whatever rule peft made the scale with.
    alphas = {name: float(layer.scaling[adapter_name] * ranks[name]) for name, layer in layers.items()}
    # One alpha for all: diffusers' reader drops those that differ from the most frequent. The rest goes into lora_up.
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    for original in dict.fromkeys(adapter.original_module(name) for name in layers):
        key = "lora_unet_" + original.name.replace(".", "_")
        adapted = [part for part in original.parts if part in layers]
        rank = max(ranks[part] for part in adapted)
        halves = [_halves(network, part, layers.get(part), rank, adapter_name) for part in original.parts]
        # a part of lower rank is filled up with zeros, but keeps its own scale
        factors = [alphas[part] / alpha * (rank / ranks[part]) if part in layers else 1.0 for part in original.parts]
        ups = [up if factor == 1.0 else up * factor for (_, up), factor in zip(halves, factors, strict=True)]
        tensors[f"{key}.lora_down.weight"] = _resting(torch.cat([down for down, _ in halves]))
        tensors[f"{key}.lora_up.weight"] = _resting(
            _ordered(ups[0] if len(ups) == 1 else torch.block_diag(*ups), original)
        )
        tensors[f"{key}.alpha"] = torch.tensor(alpha * len(original.parts))
        if any(adapter_name in layers[part].lora_magnitude_vector for part in adapted):
            scales = [_comfyui_magnitude(network, part, adapter_name) for part in original.parts]
            tensors[f"{key}.dora_scale"] = _resting(_ordered(torch.cat(scales), original))
    header = {
        "format": "pt",
        "ss_network_module": str(adapter.kohya_network),
        "ss_network_dim": str(max(ranks.values())),
    }
    return tensors, header | {"ss_network_alpha": str(alpha)}


def save_pipeline(adapter: PipelineAdapter, folder: str | Path, *, denoiser: nn.Module | None = None) -> None:
    """Write the whole pipeline as a folder that ``from_pretrained`` reads. Adapters are merged into the weights.

    Args:
        adapter: of the pipeline; its other parts are saved as they are.
        folder: created, or replaced when it already holds a pipeline.
        denoiser: the trained network when it is not ``adapter.denoiser`` itself.

    Raises:
        ConfigError: the folder holds something else, or the VAE or a text encoder is not loaded.
        CheckpointError: the disk refused; an older pipeline in the folder is untouched.
    """
    folder = Path(folder)
    pipeline = adapter.pipeline
    missing = adapter.missing_encoders
    if missing:
        raise ConfigError(
            f"cannot save a whole pipeline without its {', '.join(missing)}: they are not loaded. Use offload_encoders "
            "instead of drop_encoders, or set them on the pipeline again before saving."
        )
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} holds other files and no pipeline. Choose a new or empty folder.")
    network = _merged(adapter.denoiser if denoiser is None else denoiser)
    whole = copy.copy(pipeline)  # so that the caller's pipeline keeps its own denoiser
    setattr(whole, adapter.denoiser_name, network)
    with _staging(folder.parent, folder.name) as staging:
        whole.save_pretrained(staging / "new")
        for file in (staging / "new").rglob("*"):
            if file.is_file():
                _sync(file)
        if folder.exists():
            folder.rename(staging / "old")
        (staging / "new").rename(folder)


def _merged(network: Denoiser) -> Denoiser:
    """The network itself, or a copy with its adapters merged."""
    if not getattr(network, "peft_config", None):
        return network
    merged = copy.deepcopy(network)
    merged.fuse_lora()
    merged.unload_lora()
    return merged


def _lora_layers(network: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    return {n: m for n, m in network.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A}


def _halves(
    network: nn.Module, name: str, layer: LoraLayer | None, rank: int, adapter_name: str
) -> tuple[Tensor, Tensor]:
    """``lora_down`` and ``lora_up`` of a layer in ``rank`` dimensions; zeros where the layer is not adapted."""
    if layer is None:
        out, width = _base_weight(network.get_submodule(name)).shape
        return torch.zeros(rank, width), torch.zeros(out, rank)
    down, up = _resting(layer.lora_A[adapter_name].weight), _resting(layer.lora_B[adapter_name].weight)
    missing = rank - down.shape[0]
    if not missing:
        return down, up
    return nn.functional.pad(down, (0, 0, 0, missing)), nn.functional.pad(up, (0, missing))


def _ordered(rows: Tensor, original: Original) -> Tensor:
    """Rows in the original network's order."""
    return torch.cat(rows.chunk(2)[::-1]) if original.swapped else rows


def _base_weight(module: Any) -> Tensor:
    return (module.get_base_layer() if isinstance(module, LoraLayer) else module).weight.detach()


def _comfyui_magnitude(network: nn.Module, name: str, adapter_name: str) -> Tensor:
    """DoRA's magnitude m, restated: ours is W' = m (W + D) / |W + D|, ComfyUI's is W' = scale (W + D) / |W|.

    A layer without DoRA has scale |W|, which leaves W + D as it is.
    """
    module: Any = network.get_submodule(name)
    weight = _base_weight(module).float()

    def norm(w: Tensor) -> Tensor:
        return w.flatten(1).norm(dim=1)

    scale = norm(weight)
    if isinstance(module, LoraLayer) and adapter_name in module.lora_magnitude_vector:
        delta = module.get_delta_weight(adapter_name).detach().float()
        magnitude = module.lora_magnitude_vector[adapter_name].weight.detach().float().flatten()
        scale = magnitude * scale / norm(weight + delta)
    return scale.view(-1, *[1] * (weight.ndim - 1))


def _resting(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


@contextmanager
def _staging(parent: Path, name: str = "lora") -> Iterator[Path]:
    """A hidden folder beside the target, gone afterwards; the disk's refusals become one clear error."""
    staging: Path | None = None
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=parent))
        yield staging
    except (OSError, SafetensorError) as error:
        if staging is not None and (staging / "old").exists() and not (parent / name).exists():
            (staging / "old").rename(parent / name)
        raise CheckpointError(
            f"could not write the weights to {parent}: {error}. What was there before is untouched; free space or "
            "choose another folder, and save again."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

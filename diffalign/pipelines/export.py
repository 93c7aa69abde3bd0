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

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from .base import Denoiser, PipelineAdapter
from .names import original_name

log = logging.getLogger(__name__)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
KOHYA_FILE = "kohya_comfyui_lora.safetensors"
# What a reader needs to rebuild the adapter, and no more: older versions of peft refuse fields they do not know.
_LORA_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")


def save_lora(
    adapter: PipelineAdapter, folder: str | Path, *, denoiser: nn.Module | None = None, adapter_name: str = "default"
) -> list[Path]:
    """Write an adapter for diffusers and, beside it, for kohya's tools and ComfyUI.

    ``pipeline.load_lora_weights(folder)`` reads the first file. The second is named as each family is by kohya:
    SDXL by the original code's blocks, SD by diffusers' (ComfyUI reads both). DoRA has no agreed meaning in that format
    (readers disagree on which norm divides); its magnitudes are written so that ComfyUI's formula gives our weights.

    Args:
        adapter: whose denoiser was trained.
        folder: created when missing; other files in it are left alone.
        denoiser: the trained network when it is not ``adapter.denoiser`` itself.
        adapter_name: peft's name of the adapter.

    Returns:
        The two files.

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
        tensors, header = kohya_state_dict(adapter, network, adapter_name)
        save_file(tensors, staging / KOHYA_FILE, metadata=header)
        for name in (DIFFUSERS_FILE, KOHYA_FILE):
            _sync(staging / name)
            (staging / name).replace(folder / name)
    return [folder / DIFFUSERS_FILE, folder / KOHYA_FILE]


def kohya_state_dict(
    adapter: PipelineAdapter, network: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """An adapter's tensors in the kohya/ComfyUI naming, and the file's header.

    Args:
        adapter: tells the family.
        network: a UNet with the adapter ``adapter_name``.
        adapter_name: peft's name of the adapter.

    Returns:
        ``lora_unet_<module>.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` and, for DoRA, ``.dora_scale``.
    """
    tensors: dict[str, Tensor] = {}
    layers = _lora_layers(network, adapter_name)
    ranks = {name: layer.lora_A[adapter_name].weight.shape[0] for name, layer in layers.items()}
    # Readers scale by alpha / rank, whatever rule peft made the scale with.
    alphas = {name: float(layer.scaling[adapter_name] * ranks[name]) for name, layer in layers.items()}
    # One alpha for all: diffusers' reader drops those that differ from the most frequent. The rest goes into lora_up.
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    for name, layer in layers.items():
        key = "lora_unet_" + _kohya_module(adapter, network, name).replace(".", "_")
        down, up = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        tensors[f"{key}.lora_down.weight"] = _resting(down)
        tensors[f"{key}.lora_up.weight"] = _resting(up if alphas[name] == alpha else up * (alphas[name] / alpha))
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
        if adapter_name in layer.lora_magnitude_vector:
            tensors[f"{key}.dora_scale"] = _comfyui_magnitude(layer, adapter_name)
    header = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks.values()))}
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
    missing = [name for name in ("vae", *adapter.text_encoder_names) if getattr(pipeline, name) is None]
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


def _kohya_module(adapter: PipelineAdapter, network: Denoiser, name: str) -> str:
    if adapter.family != "sdxl":
        return name
    attending = {i for i, kind in enumerate(network.config.up_block_types) if "Attn" in kind}
    return original_name(name, network.config.layers_per_block, attending)


def _comfyui_magnitude(layer: LoraLayer, adapter_name: str) -> Tensor:
    """DoRA's magnitude m, restated: ours is W' = m (W + D) / |W + D|, ComfyUI's is W' = scale (W + D) / |W|."""
    weight = layer.get_base_layer().weight.detach().float()
    delta = layer.get_delta_weight(adapter_name).detach().float()

    def norm(w: Tensor) -> Tensor:
        return w.flatten(1).norm(dim=1)

    magnitude = layer.lora_magnitude_vector[adapter_name].weight.detach().float().flatten()
    scale = magnitude * norm(weight) / norm(weight + delta)
    return scale.view(-1, *[1] * (weight.ndim - 1)).cpu().contiguous()


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

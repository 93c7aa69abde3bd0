"""The four families, and LoRAs for them that do something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from diffalign.pipelines import adapter_for, save_lora
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3, tiny_sdxl

BUILDERS = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
STEPS = 3
LORA_RANK, LORA_ALPHA = 2, 4


def prompt_arguments(family: str, guidance: float) -> dict:
    """Arguments of ``pipe()`` for guidance at this scale, by two prompts."""
    told = {"prompt": ["a red circle", "two stars"], "num_inference_steps": STEPS, "height": 32, "width": 32}
    if family == "flux":
        return told | {"true_cfg_scale": guidance, "negative_prompt": ["", ""], "max_sequence_length": 32}
    return told | {"guidance_scale": guidance}


def draw(pipe, family: str, guidance: float = 4.0, **more) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    return pipe(**prompt_arguments(family, guidance), generator=generator, output_type="latent", **more).images


def write_lora(pipe_builder, folder: Path, seed: int, *, dora: bool = False, targets=("to_q", "to_out.0")) -> Path:
    """A LoRA with random weights, as a trainer writes it."""
    adapter = adapter_for(pipe_builder())
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(targets), use_dora=dora)
    adapter.denoiser.add_adapter(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapter.denoiser.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    save_lora(adapter, folder)
    return folder


@pytest.fixture(scope="session")
def loras(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Folders of a negative and of a positive LoRA by family."""
    root = tmp_path_factory.mktemp("loras")
    return {
        family: (
            write_lora(builder, root / f"{family}-neg", 1),
            write_lora(builder, root / f"{family}-pos", 2, targets=("to_q", "to_v")),
        )
        for family, builder in BUILDERS.items()
    }

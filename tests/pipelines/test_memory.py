"""The true full-size denoisers, on the meta device: parameters, LoRA targets, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from diffalign.config import load_job, recipes
from diffalign.errors import ConfigError
from diffalign.pipelines import adapter_for
from diffalign.pipelines.memory import (
    GIB,
    estimate_memory,
    lora_modules,
    lora_parameter_count,
    meta_denoiser,
    parameter_count,
)
from tests.pipelines.full_size import FLUX_DEV, SD3_MEDIUM, SD15_UNET, SDXL_UNET
from tests.tiny import tiny_flux, tiny_sd3, tiny_sdxl

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
SIZES = {"sdxl": (SDXL_UNET, 2_567_463_684, 560), "sd15": (SD15_UNET, 859_520_964, 128)}


@pytest.fixture(scope="module", params=SIZES)
def full_size(request):
    config, parameters, attention_layers = SIZES[request.param]
    return request.param, meta_denoiser(config), parameters, attention_layers


def test_published_parameter_counts(full_size):
    _, unet, parameters, _ = full_size
    assert parameter_count(unet) == parameters
    assert all(parameter.is_meta for parameter in unet.parameters())


def test_default_targets_are_the_four_projections_of_every_attention(full_size):
    name, unet, _, attention_layers = full_size
    matched = lora_modules(unet, LORA_TARGETS)
    assert len(matched) == attention_layers
    # one to_q per attention, two attentions per transformer block
    blocks = {n.rsplit(".attn", 1)[0] for n in matched}
    assert len(blocks) == {"sdxl": 70, "sd15": 16}[name] and attention_layers == 8 * len(blocks)
    assert lora_parameter_count(unet, 16, LORA_TARGETS) == {"sdxl": 23_224_320, "sd15": 3_188_736}[name]
    assert lora_parameter_count(unet, 64, LORA_TARGETS) == 4 * lora_parameter_count(unet, 16, LORA_TARGETS)


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("to_q", "proj_in", "conv1", "ff.net.2")])
@pytest.mark.parametrize("dora", [False, True])
def test_lora_parameter_count_is_what_peft_adds(targets, dora):
    unet = tiny_sdxl().unet
    expected = lora_parameter_count(unet, 4, targets, dora=dora)
    unet.add_adapter(LoraConfig(r=4, target_modules=list(targets), use_dora=dora))
    assert sum(p.numel() for n, p in unet.named_parameters() if "lora_" in n) == expected


def test_recipes_have_the_memory_their_arithmetic_says():
    lora = estimate_memory(SDXL_UNET, lora_rank=64, gradient_checkpointing=True)
    assert lora.weights == 2 * 2_567_463_684  # the frozen base in bf16
    assert lora.adapter == lora.gradients == 4 * 92_897_280 and lora.optimizer == 2 * lora.adapter
    assert lora.reference == 0  # adapters switched off
    assert lora.total < 12 * GIB

    full = estimate_memory(SDXL_UNET, adapter="none", optimizer="adamw", gradient_checkpointing=True)
    assert full.weights == (4 + 2) * 2_567_463_684 and full.gradients == 4 * 2_567_463_684
    assert full.optimizer == 8 * 2_567_463_684 and full.reference == 4 * 2_567_463_684
    thrifty = estimate_memory(
        SDXL_UNET, adapter="none", optimizer="adafactor", gradient_checkpointing=True, reference_dtype="bf16"
    )
    assert thrifty.total < 40 * GIB < full.total
    assert estimate_memory(SDXL_UNET, adapter="none", ema=True).optimizer - full.optimizer == full.gradients
    assert "GiB" in str(full)


@pytest.mark.parametrize("name", ["sdxl-dpo-lora", "sdxl-dpo-full", "sd15-dpo-full"])
def test_the_headers_of_recipes_state_what_the_true_configuration_gives(name):
    _, config = load_job(name)
    unet = meta_denoiser(SD15_UNET if name.startswith("sd15") else SDXL_UNET)
    base = parameter_count(unet) / 1e9
    if config.adapter == "none":  # fp32 masters or gradients or reference; AdamW's two moments
        stated = [4 * base, 8 * base] + ([20 * base] if config.optimizer == "adamw" else [2 * base])
    else:  # the base in bf16; the adapter with gradient and moments
        stated = [2 * base, 16 * lora_parameter_count(unet, config.lora_rank, LORA_TARGETS) / 1e9]
    header = recipes()[name].read_text().split("\nmethod:")[0]
    assert [number for number in stated if f"{number:.1f} GB" not in header] == []
    assert f"{base:.2f} B" in header


def test_activations_grow_with_images_and_resolution_and_shrink_with_checkpointing():
    base = estimate_memory(SDXL_UNET).activations
    assert estimate_memory(SDXL_UNET, images=4).activations == 2 * base
    assert estimate_memory(SDXL_UNET, resolution=512).activations == base / 4
    assert estimate_memory(SDXL_UNET, mixed_precision="no").activations == 2 * base
    assert estimate_memory(SDXL_UNET, gradient_checkpointing=True).activations < base / 4


def traced_bytes(config, inputs, lora_targets, monkeypatch) -> int:
    """Bytes autograd saves on the meta device with a fused attention; its backward needs q, k, v and the output."""

    class FusedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out = torch.empty_like(q)
            ctx.save_for_backward(q, k, v, out)
            return out

        @staticmethod
        def backward(ctx, gradient):
            raise AssertionError("never called")

    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda query, key, value, **_: FusedAttention.apply(query, key, value)
    )
    network = meta_denoiser(config)
    if lora_targets is not None:
        network.requires_grad_(False)
        with torch.device("meta"):
            network.add_adapter(LoraConfig(r=16, target_modules=list(lora_targets)))
    weights = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor  # kept, so that no storage is counted twice
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


@pytest.mark.parametrize("name", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_near_what_autograd_saves(name, lora, monkeypatch):
    config = SIZES[name][0]
    side = config["sample_size"]
    with torch.device("meta"):
        inputs = {
            "sample": torch.empty(2, 4, side, side),
            "timestep": torch.zeros(2, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(2, 77, config["cross_attention_dim"]),
            "added_cond_kwargs": {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)},
        }
    traced = traced_bytes(config, inputs, LORA_TARGETS if lora else None, monkeypatch)
    estimate = estimate_memory(config, resolution=8 * side, images=2, mixed_precision="no").activations
    # One estimate for both: with an adapter the frozen layers save less, so there it errs to the safe side.
    assert 1 / 1.3 < estimate / traced < (1.5 if lora else 1.3)


@pytest.mark.parametrize(
    "wrong", [{"mixed_precision": "fp8"}, {"optimizer": "sgd"}, {"adapter": "full"}, {"reference_dtype": "fp32"}]
)
def test_unknown_values_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be one of"):
        estimate_memory(SD15_UNET, **wrong)


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(ConfigError, match="match no layer"):
        estimate_memory(SD15_UNET, lora_targets=("query",))


# --- transformers ----------------------------------------------------------------------------------------------

TRANSFORMERS = {"sd3": (SD3_MEDIUM, 2_028_328_000, 191), "flux": (FLUX_DEV, 11_901_408_320, 342)}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_their_published_size(name):
    config, parameters, layers = TRANSFORMERS[name]
    network = meta_denoiser(config)
    assert parameter_count(network) == parameters
    build = {"sd3": tiny_sd3, "flux": tiny_flux}[name]
    targets = adapter_for(build()).default_lora_targets
    assert len(lora_modules(network, targets)) == layers  # SD3's last block has no to_add_out
    estimate = estimate_memory(config, lora_rank=16)
    assert estimate.weights == 2 * parameters
    assert estimate.adapter == 4 * lora_parameter_count(network, 16, targets)
    assert type(meta_denoiser(build().transformer.config)) is type(network)


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("lora", [False, True])
def test_activations_of_transformers_are_near_what_autograd_saves(name, lora, monkeypatch):
    """With a few of the blocks: all are alike."""
    flux = name == "flux"
    config = TRANSFORMERS[name][0] | ({"num_layers": 2, "num_single_layers": 4} if flux else {"num_layers": 4})
    with torch.device("meta"):
        inputs = {"timestep": torch.empty(2), "pooled_projections": torch.empty(2, config["pooled_projection_dim"])}
        if flux:
            inputs |= {"hidden_states": torch.empty(2, 4096, 64), "encoder_hidden_states": torch.empty(2, 512, 4096)}
            inputs |= {"img_ids": torch.empty(4096, 3), "txt_ids": torch.empty(512, 3), "guidance": torch.empty(2)}
        else:
            inputs |= {"hidden_states": torch.empty(2, 16, 128, 128)}
            inputs |= {"encoder_hidden_states": torch.empty(2, 333, 4096)}
    targets = adapter_for((tiny_flux if flux else tiny_sd3)()).default_lora_targets
    traced = traced_bytes(config, inputs, targets if lora else None, monkeypatch)
    estimate = estimate_memory(config, mixed_precision="no")
    assert 1 / 1.3 < estimate.activations / traced < (1.9 if lora else 1.3)
    checkpointed = estimate_memory(config, mixed_precision="no", gradient_checkpointing=True)
    assert checkpointed.activations < estimate.activations / 2


def test_unknown_networks_are_refused():
    for config, said in (({"_class_name": "QwenImageTransformer2DModel"}, "QwenImage"), ({}, "an unknown network")):
        with pytest.raises(ConfigError, match=f"FluxTransformer2DModel; got the configuration of {said}"):
            estimate_memory(config)

"""SD3 and FLUX: what is exported draws the same pictures in a fresh pipeline."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.pipelines import adapter_for, save_lora, save_pipeline
from diffalign.pipelines.export import DIFFUSERS_FILE, KOHYA_FILE, kohya_state_dict
from diffalign.pipelines.memory import meta_denoiser
from diffalign.pipelines.sd import StableDiffusionAdapter
from diffalign.pipelines.transformer_names import flux_original, sd3_original
from tests.pipelines.full_size import FLUX_DEV
from tests.pipelines.test_export import with_lora as with_unet_lora
from tests.tiny import tiny_flux, tiny_sd, tiny_sd3

FAMILIES = {"sd3": tiny_sd3, "sd3.5": lambda: tiny_sd3(version="3.5"), "flux": tiny_flux}
WIDE = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj"]
WIDE += ["ff.net.2", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "proj_mlp", "proj_out"]
WIDE += ["norm_out.linear", "context_embedder", "timestep_embedder.linear_1"]


def pictures(pipeline: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    size = {"height": 32, "width": 32, "output_type": "np"}
    return np.asarray(pipeline("a red circle", num_inference_steps=2, generator=generator, **size).images)


def with_lora(pipeline: DiffusionPipeline, targets=None, *, rank=4, alpha=6.0, **options) -> DiffusionPipeline:
    """An adapter as a trainer leaves it: alpha unlike the rank, both halves away from their start."""
    targets = adapter_for(pipeline).default_lora_targets if targets is None else targets
    pipeline.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **options))
    move(pipeline.transformer)
    return pipeline


def move(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))


def deltas(network: torch.nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    layers = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer.get_delta_weight(adapter_name).detach() for name, layer in layers.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"targets": WIDE}, {"use_dora": True}], ids=["default", "wide", "dora"])
def test_diffusers_file_draws_identical_pictures_in_a_fresh_pipeline(family, options, tmp_path):
    trained = with_lora(FAMILIES[family](), **options)
    expected = pictures(trained)
    assert np.abs(expected - pictures(FAMILIES[family]())).max() > 0.01  # the adapter does something
    files = save_lora(adapter_for(trained), tmp_path)
    assert [file.name for file in files] == [DIFFUSERS_FILE, KOHYA_FILE]
    for source in (tmp_path, files[0]):
        fresh = FAMILIES[family]()
        fresh.load_lora_weights(str(source))
        assert np.array_equal(pictures(fresh), expected)


def test_default_targets_match_in_every_block():
    for family, build in FAMILIES.items():
        trained = with_lora(build())
        adapted = set(deltas(trained.transformer))
        double = {name.split(".")[1] for name in adapted if name.startswith("transformer_blocks")}
        assert double == {"0", "1"}
        single = {name.split(".", 2)[2] for name in adapted if name.startswith("single")}
        assert single == ({"attn.to_q", "attn.to_k", "attn.to_v"} if family == "flux" else set())


# --- kohya and ComfyUI -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3", "3.5"])
@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5.0}}])
def test_sd3_kohya_file_is_the_same_change_of_the_original_network(version, options):
    """diffusers' converter of original checkpoints is the judge: it undoes names, fusing and the swapped norm."""
    trained = with_lora(tiny_sd3(version=version), WIDE, **options)
    tensors, header = kohya_state_dict(adapter_for(trained), trained.transformer)
    assert header["ss_network_module"] == "networks.lora_sd3"
    change = {
        key.removesuffix(".alpha"): alpha / tensors[key.replace(".alpha", ".lora_down.weight")].shape[0]
        for key, alpha in tensors.items()
        if key.endswith(".alpha")
    }
    change = {k: s * tensors[f"{k}.lora_up.weight"] @ tensors[f"{k}.lora_down.weight"] for k, s in change.items()}
    original, used = {"pos_embed": torch.zeros(1)}, set()
    ours = {n for n, m in trained.transformer.named_modules() if isinstance(m, LoraLayer)}
    for name, module in tiny_sd3(version=version).transformer.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            place = sd3_original(name, 2)
            key = "lora_unet_" + place.name.replace(".", "_")
            rows = len(place.parts) * module.weight.shape[0]
            empty = torch.zeros(rows, *module.weight.shape[1:])
            original[f"{place.name}.weight"] = change.get(key, empty)
            original[f"{place.name}.bias"] = torch.zeros(rows)
            used.add(key)
    assert set(change) <= used
    if version == "3.5":
        norms = [("x_block.attn", 2), ("context_block.attn", 2), ("x_block.attn2", 1)]
        for block, count in norms:
            for layer in range(count):
                original |= {f"joint_blocks.{layer}.{block}.ln_{x}.weight": torch.zeros(8) for x in "qk"}
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    expected = deltas(trained.transformer)
    assert expected.keys() == ours
    for name, weight in converted.items():
        if name.endswith(".weight") and weight.ndim == 2:
            module = name.removesuffix(".weight")
            wanted = expected.get(module, torch.zeros_like(weight))
            assert torch.allclose(weight, wanted, atol=1e-5), name


@pytest.fixture(scope="module")
def wide_flux() -> FluxTransformer2DModel:
    """One double and one single block of the true width: diffusers' reader knows no other. Nothing is stored."""
    return meta_denoiser(FLUX_DEV | {"num_layers": 1, "num_single_layers": 1, "_class_name": "FluxTransformer2DModel"})


@pytest.mark.parametrize("targets", [["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"], None])
def test_flux_kohya_file_is_read_back_by_diffusers(targets, wide_flux):
    network = copy.deepcopy(wide_flux)
    adapter = adapter_for(tiny_flux())
    chosen = adapter.default_lora_targets if targets is None else targets
    with torch.device("meta"):
        network.add_adapter(LoraConfig(r=2, lora_alpha=3.0, target_modules=list(chosen)))
    for module in network.modules():
        if isinstance(module, LoraLayer):
            for half in (module.lora_A, module.lora_B):
                half["default"].to_empty(device="cpu")
    move_only_lora(network)
    tensors, header = kohya_state_dict(adapter, network)
    assert header["ss_network_module"] == "networks.lora_flux"
    read = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    layers = {name: m for name, m in network.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        down, up = read.pop(f"transformer.{name}.lora_A.weight"), read.pop(f"transformer.{name}.lora_B.weight")
        scale = layer.scaling["default"]
        wanted = scale * layer.lora_B["default"].weight[:64] @ layer.lora_A["default"].weight[:, :64]
        assert torch.allclose(up[:64] @ down[:, :64], wanted, atol=1e-5), name
        assert up.shape == layer.lora_B["default"].weight.shape and down.shape[1] == layer.in_features
    for name, rest in read.items():  # parts of a fused matrix that were not adapted
        assert ".lora_A." in name or not rest.any(), name


def move_only_lora(network: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_flux_kohya_file_loads_into_a_pipeline(tmp_path):
    """Without the single blocks, whose width diffusers' reader has hard-wired, the tiny pipeline reads its file."""
    trained = with_lora(tiny_flux(), ["to_out.0", "add_q_proj", "add_k_proj", "to_add_out", "ff.net.2", "norm1.linear"])
    files = save_lora(adapter_for(trained), tmp_path)
    fresh = tiny_flux()
    fresh.load_lora_weights(str(files[1]))
    assert np.allclose(pictures(fresh), pictures(trained), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_kohya_names_are_those_of_the_original_code(family, tmp_path):
    _, kohya = save_lora(adapter_for(with_lora(FAMILIES[family](), WIDE)), tmp_path)
    names = {key.split(".")[0] for key in load_file(kohya)}
    expected = {
        "sd3": {"joint_blocks_0_x_block_attn_qkv", "joint_blocks_1_context_block_adaLN_modulation_1"},
        "sd3.5": {"joint_blocks_0_x_block_attn2_qkv", "joint_blocks_0_x_block_attn2_proj", "final_layer_linear"},
        "flux": {"double_blocks_1_txt_attn_qkv", "single_blocks_1_linear1", "single_blocks_0_linear2"},
    }[family]
    assert {f"lora_unet_{name}" for name in expected | {"final_layer_adaLN_modulation_1"}} <= names
    with safe_open(kohya, framework="pt") as file:
        assert file.metadata()["ss_network_module"].startswith("networks.lora_")


def test_every_layer_has_an_original_and_fused_ones_agree_on_it():
    for network, original in (
        (tiny_sd3(version="3.5").transformer, lambda name: sd3_original(name, 2)),
        (tiny_flux().transformer, flux_original),
    ):
        layers = [n for n, m in network.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        places = {name: original(name) for name in layers}
        assert all(name in place.parts for name, place in places.items())
        assert len({place.name for place in places.values()}) == len(set(places.values()))
        with pytest.raises(KeyError):
            original("transformer_blocks.0.attn.to_x")


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_in_the_kohya_file_means_our_weights_to_comfyui(family):
    """ComfyUI on the output axis: W' = dora_scale (W + alpha / rank up @ down) / |W|, W being the fused matrix."""
    targets = ["attn.to_q", "attn.to_v", "norm_out.linear", "attn.to_out.0"]
    trained = with_lora(FAMILIES[family](), targets, use_dora=True)
    adapter = adapter_for(trained)
    tensors, _ = kohya_state_dict(adapter, trained.transformer)
    merged = copy.deepcopy(trained.transformer)
    merged.fuse_lora()
    merged.unload_lora()
    before = dict(FAMILIES[family]().transformer.named_parameters())
    after = dict(merged.named_parameters())
    places = {adapter.original_module(name) for name in deltas(trained.transformer)}
    assert len(places) == sum(key.endswith(".dora_scale") for key in tensors)
    for place in places:
        key = "lora_unet_" + place.name.replace(".", "_")
        base, wanted = (torch.cat([side[f"{part}.weight"] for part in place.parts]) for side in (before, after))
        if place.swapped:
            base, wanted = (torch.cat(w.chunk(2)[::-1]) for w in (base, wanted))
        up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
        changed = base + tensors[f"{key}.alpha"] / down.shape[0] * up @ down
        restated = tensors[f"{key}.dora_scale"] * changed / base.norm(dim=1, keepdim=True)
        assert torch.allclose(restated, wanted, atol=1e-5), place.name


def test_a_family_without_a_kohya_format_writes_diffusers_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusionAdapter, "kohya_network", None)
    files = save_lora(adapter_for(with_unet_lora(tiny_sd())), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [DIFFUSERS_FILE] == [file.name for file in files]


# --- whole pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_pipeline_folder_draws_identical_pictures(family, lora, tmp_path):
    trained = FAMILIES[family]()
    if lora:
        with_lora(trained)
    else:
        with torch.no_grad():
            trained.transformer.proj_out.bias.add_(0.1)
    assert np.abs(pictures(trained) - pictures(FAMILIES[family]())).max() > 0.01
    save_pipeline(adapter_for(trained), tmp_path / "final")
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "final")
    assert type(reloaded) is type(trained)
    assert not any("lora" in name for name, _ in reloaded.transformer.named_parameters())
    close = np.allclose(pictures(reloaded), pictures(trained), atol=1e-3)
    assert close if lora else np.array_equal(pictures(reloaded), pictures(trained))

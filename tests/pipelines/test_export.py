"""What is exported draws the same pictures in a fresh pipeline, bit for bit."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from diffalign.errors import CheckpointError, ConfigError
from diffalign.pipelines import adapter_for, save_lora, save_pipeline
from diffalign.pipelines.export import DIFFUSERS_FILE, KOHYA_FILE, kohya_state_dict
from diffalign.pipelines.memory import meta_denoiser
from diffalign.pipelines.names import original_name
from tests.pipelines.full_size import SDXL_UNET
from tests.tiny import tiny_sd, tiny_sdxl

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WIDE = [
    *ATTENTION,
    "ff.net.0.proj",
    "ff.net.2",
    "proj_in",
    "proj_out",
    "conv1",
    "conv2",
    "time_emb_proj",
    "conv_shortcut",
]


def pictures(pipeline: DiffusionPipeline) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    images = pipeline(
        ["a red circle", "two stars"], num_inference_steps=2, generator=generator, output_type="np"
    ).images
    return np.asarray(images)


def build(family: str, **kwargs) -> DiffusionPipeline:
    return tiny_sdxl(layers_per_block=2, **kwargs) if family == "sdxl" else tiny_sd(layers_per_block=2, **kwargs)


def with_lora(pipeline: DiffusionPipeline, *, targets=ATTENTION, rank=4, alpha=6.0, **kwargs) -> DiffusionPipeline:
    """An adapter as a trainer leaves it: alpha unlike the rank, both halves away from their start."""
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **kwargs))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if "lora_B" in name or "lora_A" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return pipeline


@pytest.mark.parametrize("family", ["sdxl", "sd"])
@pytest.mark.parametrize("targets", [ATTENTION, WIDE], ids=["attention", "wide"])
def test_both_lora_files_draw_identical_pictures_in_a_fresh_pipeline(family, targets, tmp_path):
    trained = with_lora(build(family), targets=targets)
    expected = pictures(trained)
    assert np.abs(expected - pictures(build(family))).max() > 0.01  # the adapter does something
    files = save_lora(adapter_for(trained), tmp_path / "new" / "folder")
    assert [file.name for file in files] == [DIFFUSERS_FILE, KOHYA_FILE]
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(f.name for f in files)
    for source in (files[0].parent, files[0], files[1]):  # the folder alone finds diffusers' file
        fresh = build(family)
        fresh.load_lora_weights(str(source))
        layers = {n for n, _ in fresh.unet.named_modules() if n.endswith("lora_A")}
        assert len(layers) == sum(key.endswith(".alpha") for key in load_file(files[1]))
        assert np.array_equal(pictures(fresh), expected), source


@pytest.mark.parametrize("family", ["sdxl", "sd"])
@pytest.mark.parametrize(("rank", "alpha"), [(2, 2.0), (8, 1.0), (3, 10.0)])
def test_scale_survives_whatever_rank_and_alpha(family, rank, alpha, tmp_path):
    trained = with_lora(build(family), rank=rank, alpha=alpha)
    files = save_lora(adapter_for(trained), tmp_path)
    for file in files:
        fresh = build(family)
        fresh.load_lora_weights(str(file))
        assert np.array_equal(pictures(fresh), pictures(trained))


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_rank_stabilised_lora_and_rank_patterns(family, tmp_path):
    trained = with_lora(build(family), use_rslora=True, rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 5.0})
    for file in save_lora(adapter_for(trained), tmp_path):
        fresh = build(family)
        fresh.load_lora_weights(str(file))
        assert np.allclose(pictures(fresh), pictures(trained), atol=1e-4)  # kohya's lora_up is rounded once more


@pytest.mark.parametrize("family", ["sdxl", "sd"])
def test_dora_draws_identical_pictures_in_a_fresh_pipeline(family, tmp_path):
    trained = with_lora(build(family), use_dora=True)
    plain = with_lora(build(family))
    assert np.abs(pictures(trained) - pictures(plain)).max() > 0.01
    save_lora(adapter_for(trained), tmp_path)
    fresh = build(family)
    fresh.load_lora_weights(str(tmp_path))
    assert np.array_equal(pictures(fresh), pictures(trained))


@pytest.mark.parametrize("targets", [["to_q", "ff.net.2"], ["conv1"]])
def test_dora_in_the_kohya_file_means_our_weights_to_comfyui(targets):
    """ComfyUI on the output axis: W' = dora_scale (W + alpha / rank up @ down) / |W| (comfy/weight_adapter/base.py)."""
    trained = with_lora(tiny_sdxl(), targets=targets, use_dora=True)
    tensors, _ = kohya_state_dict(adapter_for(trained), trained.unet)
    merged = copy.deepcopy(trained.unet)
    merged.fuse_lora()
    merged.unload_lora()
    before, after = dict(tiny_sdxl().unet.named_parameters()), dict(merged.named_parameters())
    checked = 0
    for name, weight in before.items():
        if not name.endswith(".weight") or not any(name.endswith(f".{t}.weight") for t in targets):
            continue
        key = "lora_unet_" + original_name(name.removesuffix(".weight"), 1, {0, 1}).replace(".", "_")
        up, down = tensors[f"{key}.lora_up.weight"].flatten(1), tensors[f"{key}.lora_down.weight"].flatten(1)
        delta = (tensors[f"{key}.alpha"] / down.shape[0] * up @ down).view_as(weight)
        norm = weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1))
        assert tensors[f"{key}.dora_scale"].shape == norm.shape
        restated = tensors[f"{key}.dora_scale"] * (weight + delta) / norm
        assert torch.allclose(restated, after[name], atol=1e-5)
        checked += 1
    assert checked == len([k for k in tensors if k.endswith(".alpha")]) > 0


def test_sdxl_kohya_names_are_those_of_the_original_code(tmp_path):
    trained = with_lora(build("sdxl"))
    _, kohya = save_lora(adapter_for(trained), tmp_path)
    names = {key.split(".")[0] for key in load_file(kohya)}
    assert all(
        n.startswith(("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")) for n in names
    )
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in names
    assert "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_out_0" in names
    with safe_open(kohya, framework="pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"


def test_original_names_of_the_full_size_sdxl_unet():
    """Block numbers as in the published sd_xl_base checkpoint."""
    unet = meta_denoiser(SDXL_UNET)
    names = {
        name: original_name(name, 2, {0, 1})
        for name, m in unet.named_modules()
        if hasattr(m, "weight") and "norm" not in name
    }
    assert len(set(names.values())) == len(names)
    assert names["conv_in"] == "input_blocks.0.0" and names["conv_out"] == "out.2"
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert (
        names["down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"]
        == "input_blocks.4.1.transformer_blocks.1.attn1.to_q"
    )
    assert names["down_blocks.2.resnets.1.conv1"] == "input_blocks.8.0.in_layers.2"
    assert names["mid_block.resnets.1.time_emb_proj"] == "middle_block.2.emb_layers.1"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["up_blocks.2.resnets.2.conv_shortcut"] == "output_blocks.8.0.skip_connection"
    assert names["add_embedding.linear_2"] == "label_emb.0.2"
    for kind, blocks in (("input", {4, 5, 7, 8}), ("output", set(range(6)))):
        attending = {int(n.split(".")[1]) for n in names.values() if n.startswith(f"{kind}_blocks") and "attn1" in n}
        assert attending == blocks


def test_sd_kohya_names_are_diffusers_with_underscores(tmp_path):
    _, kohya = save_lora(adapter_for(with_lora(build("sd"))), tmp_path)
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha" in load_file(kohya)


def test_a_trained_copy_can_be_saved_instead(tmp_path):
    trained = with_lora(build("sdxl"))
    files = save_lora(adapter_for(build("sdxl")), tmp_path, denoiser=trained.unet)
    fresh = build("sdxl")
    fresh.load_lora_weights(str(files[0]))
    assert np.array_equal(pictures(fresh), pictures(trained))


def test_full_weights_as_an_adapter_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no adapter named 'default'.*save_pipeline"):
        save_lora(adapter_for(build("sd")), tmp_path)


# --- whole pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sdxl", "sd", "sd-v"])
def test_pipeline_folder_draws_identical_pictures(family, tmp_path):
    trained = tiny_sd(prediction_type="v_prediction") if family == "sd-v" else build(family)
    with torch.no_grad():
        trained.unet.conv_out.bias.add_(0.1)
    save_pipeline(adapter_for(trained), tmp_path / "final")
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "final")
    assert type(reloaded) is type(trained)
    assert np.array_equal(pictures(reloaded), pictures(trained))
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_trained_copy_is_saved_and_the_pipeline_keeps_its_own(tmp_path):
    pipeline = build("sdxl")
    trained = copy.deepcopy(pipeline.unet)
    with torch.no_grad():
        trained.conv_out.bias.add_(0.1)
    own, before = pipeline.unet, pictures(pipeline)
    save_pipeline(adapter_for(pipeline), tmp_path / "final", denoiser=trained)
    assert pipeline.unet is own and np.array_equal(pictures(pipeline), before)
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "final")
    assert torch.equal(reloaded.unet.conv_out.bias, trained.conv_out.bias)


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_merged_into_a_saved_pipeline(dora, tmp_path):
    trained = with_lora(build("sdxl"), use_dora=dora)
    save_pipeline(adapter_for(trained), tmp_path / "final")
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "final")
    assert not any("lora" in name for name, _ in reloaded.unet.named_parameters())
    assert np.allclose(pictures(reloaded), pictures(trained), atol=1e-3)
    assert trained.unet.peft_config  # the run goes on with its adapter


def test_an_older_pipeline_is_replaced_and_anything_else_is_not(tmp_path):
    adapter = adapter_for(build("sdxl"))
    save_pipeline(adapter, tmp_path / "final")
    (tmp_path / "final" / "stale").write_text("from before")
    save_pipeline(adapter, tmp_path / "final")
    assert not (tmp_path / "final" / "stale").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        save_pipeline(adapter, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"


def test_a_pipeline_without_its_encoders_is_not_saved(tmp_path):
    adapter = adapter_for(build("sdxl"))
    adapter.drop_encoders()
    with pytest.raises(ConfigError, match="without its vae, text_encoder, text_encoder_2"):
        save_pipeline(adapter, tmp_path / "final")
    assert not (tmp_path / "final").exists()


# --- a full disk -----------------------------------------------------------------------------------------------


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_disk_full_leaves_the_older_lora_whole(tmp_path, monkeypatch):
    trained = with_lora(build("sdxl"))
    files = save_lora(adapter_for(trained), tmp_path)
    before = [file.read_bytes() for file in files]
    with torch.no_grad():
        next(p for n, p in trained.unet.named_parameters() if "lora_B" in n).add_(1)
    monkeypatch.setattr("diffalign.pipelines.export.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device.*free space"):
        save_lora(adapter_for(trained), tmp_path)
    assert [file.read_bytes() for file in files] == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(file.name for file in files)


def test_disk_full_leaves_the_older_pipeline_whole(tmp_path, monkeypatch):
    adapter = adapter_for(build("sdxl"))
    save_pipeline(adapter, tmp_path / "final")
    expected = pictures(DiffusionPipeline.from_pretrained(tmp_path / "final"))
    monkeypatch.setattr(type(adapter.pipeline), "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pipeline(adapter, tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]
    assert np.array_equal(pictures(DiffusionPipeline.from_pretrained(tmp_path / "final")), expected)

"""A pipeline by any of its names, and one clear error for each wrong one."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from huggingface_hub import constants, hf_api
from safetensors.torch import save_file

from diffalign.errors import ConfigError
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.load import _class_of
from tests.tiny import tiny_sd, tiny_sdxl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sdxl().save_pretrained(path)
    return path


def test_a_folder_in_the_precision_asked_for(folder):
    pipeline = load_pipeline(folder)
    assert isinstance(pipeline, StableDiffusionXLPipeline) and pipeline.watermark is None
    assert pipeline.unet.dtype == torch.float32
    assert torch.equal(pipeline.unet.conv_in.weight, tiny_sdxl().unet.conv_in.weight)
    assert load_pipeline(str(folder), dtype="bf16").unet.dtype == torch.bfloat16
    assert load_pipeline(folder, dtype=torch.float16).vae.dtype == torch.float16


def test_a_variant(tmp_path):
    tiny_sd().save_pretrained(tmp_path / "half", variant="fp16")
    assert load_pipeline(tmp_path / "half", variant="fp16").unet is not None
    with pytest.raises(ConfigError, match=r"cannot load the folder .*half, variant bf16"):
        load_pipeline(tmp_path / "half", variant="bf16")


def test_the_embedded_default_is_called_shapes(folder, monkeypatch):
    monkeypatch.setattr("diffalign.shapes.pipeline_folder", lambda: folder, raising=False)
    pipeline = load_pipeline("shapes")
    assert torch.equal(pipeline.unet.conv_in.weight, tiny_sdxl().unet.conv_in.weight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "no folder no/such/folder, and it is no hub id"),
        ("./missing", "no folder ./missing"),
        ("stable-diffusion", "no folder stable-diffusion"),
        ("owner/nothing-of-that-name", "cannot load the model on the hub .*owner/nothing-of-that-name"),
        ("missing.safetensors", "no file missing.safetensors"),
        ("model.ckpt", "can run code when it is opened"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ConfigError, match=message):
        load_pipeline(name)


def test_a_folder_above_the_pipeline_is_pointed_down(folder):
    with pytest.raises(ConfigError, match="Did you mean .*tiny"):
        load_pipeline(folder.parent)
    with pytest.raises(ConfigError, match="without model_index.json"):
        load_pipeline(folder / "unet")


def test_a_damaged_folder(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "broken")
    weights = tmp_path / "broken" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load the folder"):
        load_pipeline(tmp_path / "broken")


def test_options_that_do_not_apply(folder):
    with pytest.raises(ConfigError, match="dtype must be one of fp32, fp16, bf16; got 'float8'"):
        load_pipeline(folder, dtype="float8")
    with pytest.raises(ConfigError, match="config belongs to single-file"):
        load_pipeline(folder, config=folder)
    for name in ("shapes", folder):
        with pytest.raises(ConfigError, match="no model on the hub, so revision='v1' means nothing"):
            load_pipeline(name, revision="v1")
    for name in ("shapes", "model.safetensors"):
        with pytest.raises(ConfigError, match="has no variants, so variant='fp16' means nothing"):
            load_pipeline(name, variant="fp16")


def test_single_files_are_told_apart_by_their_text_encoders(tmp_path):
    path = tmp_path / "x.safetensors"
    assert _class_of({"conditioner.embedders.1.model.ln_final.weight"}, path).__name__ == "StableDiffusionXLPipeline"
    assert _class_of({"cond_stage_model.transformer.x"}, path).__name__ == "StableDiffusionPipeline"
    for names, message in [
        ({"a.lora_A.weight": 1}, "is a LoRA"),
        ({"weight": 1}, "no SD or SDXL checkpoint"),
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": 1}, "is an SD3 checkpoint.*pipeline folder"),
        ({"double_blocks.0.img_attn.qkv.weight": 1}, "is an FLUX checkpoint.*pipeline folder"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": 1}, "is a LoRA"),
    ]:
        save_file({name: torch.zeros(1) for name in names}, path)
        with pytest.raises(ConfigError, match=message):
            load_pipeline(path)
    path.write_bytes(b"not tensors at all")
    with pytest.raises(ConfigError, match="no usable safetensors file"):
        load_pipeline(path)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that refuses everything, as told: (status, error code)."""
    answer: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = answer
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *arguments):
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def tell(*what):
        answer[:] = what
        if not what:
            server.shutdown()
            server.server_close()

    yield tell
    if answer:
        tell()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ((404, "RepoNotFound"), r"none of this name, or it is private: check the spelling"),
        ((403, "GatedRepo"), r"terms accepted: do so at https://huggingface.co/owner/model"),
        ((404, "RevisionNotFound"), r"no revision 'v9': leave revision out"),
        ((503, None), r"answered with status 503: try again later"),
        ((), r"hub cannot be reached .*: check the network, or give a local folder"),
    ],
)
def test_what_the_hub_says_becomes_one_sentence_with_what_to_do(hub, told, message):
    hub(*told)
    with pytest.raises(ConfigError, match=f"cannot load the model on the hub .*owner/model, revision v9: .*{message}"):
        load_pipeline("owner/model", revision="v9")


def test_offline_is_named(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set and the model is not in the cache"):
        load_pipeline("owner/model")

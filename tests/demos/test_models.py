"""What can be compared: names, refusals, and adapters on one shared base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffalign.demo.models import ModelPool, parse_model, unique_labels
from diffalign.errors import CheckpointError, ConfigError
from diffalign.evaluation.lora import lora_loaded
from diffalign.guidance import negative_guidance
from diffalign.synthesis import generate_images
from tests.demos.conftest import lora
from tests.tiny import tiny_sdxl


def drawn(pipeline):
    return generate_images(pipeline, ["a cat"], [0], steps=2, guidance=2.0)[0].tobytes()


def test_names_are_understood(weights, tmp_path):
    base = str(weights["base"])
    assert parse_model("shapes").identity == "shapes" and parse_model("owner/model").kind == "pipeline"
    tuned = parse_model(f" my lora = {weights['lora']}", base)
    assert (tuned.label, tuned.kind, tuned.base) == ("my lora", "lora", base)
    assert tuned.identity == f"{base} + {tuned.source}" and len(tuned.revision) == 12
    assert parse_model(str(weights["lora"])).label == "lora"
    assert parse_model(str(weights["lora"] / "final")).label == "lora final"
    negative = parse_model(f"npo:{weights['lora']}", base)
    assert (negative.kind, negative.label) == ("negative", "npo:lora")
    assert parse_model(str(weights["other"])).kind == "pipeline"
    run = tmp_path / "run"
    shutil.copytree(weights["lora"], run)
    (run / "config.yaml").write_text("method: dpo\nmodel: some/base\n")
    assert parse_model(str(run)).base == "some/base"  # the run knows what it was trained on


def test_the_embedded_model_is_meant_wherever_the_demo_is_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    spec = parse_model("shapes")
    assert (spec.kind, spec.source, len(spec.revision)) == ("pipeline", "shapes", 12)  # new weights are another model


def test_paths_are_taken_as_people_write_them(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(weights["lora"], tmp_path / "out" / "lr=1e-4")
    (tmp_path / "out" / "lr=1e-4" / "config.yaml").write_text("model: [unfinished")
    assert parse_model("~/out/lr=1e-4", "some/base").kind == "lora"
    monkeypatch.chdir(tmp_path / "out")
    assert parse_model("lr=1e-4").label == "lr=1e-4"
    for gone in ("gone", "a/b/c", "../out/gone"):
        with pytest.raises(CheckpointError, match="no file or folder"):
            parse_model(gone)
    assert parse_model("owner/model").kind == "pipeline"
    (tmp_path / "out" / "owner").mkdir()
    with pytest.raises(CheckpointError, match="no file or folder"):  # a missing run beside others is no hub id
        parse_model("owner/model")


def test_other_weights_have_another_revision(weights, tmp_path):
    copied = tmp_path / "lora"
    shutil.copytree(weights["lora"], copied)
    assert parse_model(str(copied)).revision == parse_model(str(weights["lora"])).revision
    file = copied / "final" / "pytorch_lora_weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert parse_model(str(copied)).revision != parse_model(str(weights["lora"])).revision


def test_what_cannot_be_used_is_refused_in_one_sentence(weights, tmp_path):
    (tmp_path / "lora.bin").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "model_index.json").write_text(json.dumps({}))
    (pickled / "model.bin").write_bytes(b"x")
    for name, error in (
        ("", ConfigError),
        ("/nowhere/run", CheckpointError),
        ("npo:/nowhere", CheckpointError),
        (str(tmp_path / "lora.bin"), ConfigError),
        (str(tmp_path / "broken.safetensors"), CheckpointError),
        (str(pickled), ConfigError),
    ):
        with pytest.raises(error) as caught:
            parse_model(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="two models"):
        unique_labels([parse_model("shapes"), parse_model("shapes")])


def test_a_lora_is_switched_on_in_the_shared_base_and_off_again(weights):
    pool, base = ModelPool(device="cpu"), str(weights["base"])
    plain, tuned = parse_model(base), parse_model(str(weights["lora"]), base)
    with pool.ready(plain) as pipeline:
        before = drawn(pipeline)
    with pool.ready(tuned) as same:
        changed = drawn(same)
    assert same is pipeline and pool.loaded == [base]
    with pool.ready(plain) as pipeline:
        assert drawn(pipeline) == before != changed
    with pytest.raises(CheckpointError, match="does not fit"), pool.ready(parse_model(str(weights["misfit"]), base)):
        pass
    with pool.ready(plain) as pipeline:
        assert drawn(pipeline) == before


def test_loras_stay_loaded_and_one_alone_acts(weights, tmp_path, monkeypatch):
    """Each draws what it draws in a fresh base, in any order, beside checkpoints that need the plain layers."""
    base, loads = str(weights["base"]), []
    monkeypatch.setattr("diffalign.demo.models.KEPT_LORAS", 2)
    monkeypatch.setattr(
        "diffalign.demo.models.lora_loaded", lambda *given: loads.append(given[1]) or lora_loaded(*given)
    )
    specs = [parse_model(base)]
    for number in range(3):
        specs.append(parse_model(str(lora(tiny_sdxl(0), tmp_path / f"lora{number}")), base))
    alone = []
    for spec in specs:
        with ModelPool(device="cpu").ready(spec) as pipeline:
            alone.append(drawn(pipeline))
    assert len(set(alone)) == 4
    pool = ModelPool(device="cpu")
    loads.clear()
    for number in (1, 0, 2, 1, 2, 0, 0):
        with pool.ready(specs[number]) as pipeline:
            assert drawn(pipeline) == alone[number], number
    assert len(loads) == 2  # neither again
    whole = tmp_path / "run" / "checkpoint-000001"
    whole.mkdir(parents=True)
    save_file({"conv_out.bias": 2 * pipeline.unet.conv_out.bias.detach()}, whole / "trainable.safetensors")
    (whole / "training_config.json").write_text(json.dumps({"adapter": "none"}))
    for number in (3, 2, 0, 1):  # a third one: the two go
        with pool.ready(specs[number]) as pipeline:
            assert drawn(pipeline) == alone[number], number
        with pool.ready(parse_model(str(whole), base)) as pipeline:
            assert drawn(pipeline) != alone[0]
            assert not any("base_layer" in name for name, _ in pipeline.unet.named_parameters())
    with pytest.raises(CheckpointError, match="does not fit"), pool.ready(parse_model(str(weights["misfit"]), base)):
        pass
    for number in (0, 1):
        with pool.ready(specs[number]) as pipeline:
            assert drawn(pipeline) == alone[number], number


def test_a_negative_model_guides_and_leaves(weights):
    pool, base = ModelPool(device="cpu"), str(weights["base"])
    with pool.ready(parse_model(base)) as pipeline:
        before = drawn(pipeline)
        with negative_guidance(pipeline, weights["lora"]):
            expected = drawn(pipeline)
    with pool.ready(parse_model(f"npo:{weights['lora']}", base)) as pipeline:
        assert drawn(pipeline) == expected != before
    with pool.ready(parse_model(base)) as pipeline:
        assert drawn(pipeline) == before


def test_pipelines_beyond_the_limit_are_let_go(weights):
    pool = ModelPool(device="cpu", keep_gb=1e-9)
    first, second = str(weights["base"]), str(weights["other"])
    assert isinstance(pool.pipeline(first).unet, torch.nn.Module)
    pool.pipeline(second)
    assert pool.loaded == [second]
    roomy = ModelPool(device="cpu")
    for name in (first, second, first):
        roomy.pipeline(name)
    assert roomy.loaded == [second, first]

"""The embedded micro SDXL: what ships, what is said of it, and the script that made it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open

from diffalign.shapes import check, pipeline_folder, sample_captions
from diffalign.synthesis import generate_images

ROOT = Path(__file__).parents[2]
RECORD = json.loads((pipeline_folder() / "record.json").read_text())


def test_it_is_small_in_fp16_and_an_ordinary_sdxl_pipeline():
    files = sorted(pipeline_folder().rglob("*.safetensors"))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) == RECORD["export"]["bytes"] <= 12e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            # transformers loads in the precision of the file, diffusers in fp32: so all arrive in fp32
            expected = torch.float32 if "text_encoder" in file.parent.name else torch.float16
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {expected}  # noqa: SIM118
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_folder())
    picture = pipeline("a red circle", num_inference_steps=1).images[0]
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert type(pipeline) is StableDiffusionXLPipeline and picture.size == (64, 64)
    for name in ("tokenizer", "tokenizer_2"):  # what readers of older transformers look for
        assert (pipeline_folder() / name / "vocab.json").is_file()
        assert (pipeline_folder() / name / "merges.txt").is_file()


def test_its_card_says_what_the_record_holds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "training"))
    script = importlib.import_module("pretrain_shapes")
    assert (pipeline_folder() / "README.md").read_text() == script.model_card(RECORD)
    for split in ("held-out", "seen"):
        assert RECORD["export"][split]["n"] >= 400
    low, high = RECORD["export"]["held-out"]["ci95"]
    assert 0.25 < low < high < 0.60, "imperfect on purpose: alignment needs room"


@pytest.mark.weights
def test_it_draws_as_well_as_its_card_says():
    """A quarter of the captions of the record's kind, from other noise: within three standard errors."""
    captions = sample_captions(150, seed=77, held_out=True)
    sampler = RECORD["export"]["sampler"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_folder())
    options = {"steps": sampler["steps"], "guidance": sampler["guidance"]}
    images = generate_images(pipeline, captions, list(range(len(captions))), **options)
    strict = sum(check(image, caption).strict for image, caption in zip(images, captions, strict=True)) / len(captions)
    assert abs(strict - RECORD["export"]["held-out"]["strict"]) < 3 * 0.5 / len(captions) ** 0.5


@pytest.mark.slow
def test_the_script_that_made_it_runs_through_all_stages_and_continues(tmp_path):
    sizes = {"vae-images": 16, "vae-steps": 2, "images": 16, "unet-steps": 2, "refine-steps": 2, "batch-size": 4}
    sizes |= {"eval-prompts": 40, "steps": 1}
    command = [sys.executable, str(ROOT / "training" / "pretrain_shapes.py"), "--output-dir", str(tmp_path / "out")]
    command += ["--weights-dir", str(tmp_path / "weights"), *(f"--{name}={value}" for name, value in sizes.items())]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, "capture_output": True}

    def run() -> dict:
        done = subprocess.run(command, text=True, timeout=1800, **options)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / "weights" / "record.json").read_text())

    first = run()
    assert {"vae", "unet", "refine", "export"} <= set(first) and first["export"]["bytes"] == RECORD["export"]["bytes"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "weights")
    assert pipeline("a red circle", num_inference_steps=1).images[0].size == (64, 64)
    stages = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert run() | {"date": first["date"]} == first  # each stage is found again
    assert {path: path.stat().st_mtime_ns for path in stages} == stages

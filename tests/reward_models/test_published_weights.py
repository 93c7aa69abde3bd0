"""The published weights, where they are at hand: ``pytest -m weights tests/reward_models --weights-dir DIR``.

DIR holds one folder a scorer (``FOLDERS`` says what is in it). A folder may also hold ``reference.json``, scores that
the makers' own code gave: a list of ``{"image": file, "prompt": text, "score": number}``, images beside it; then every
score must agree within ``TOLERANCE``. Without it, only what must hold for any picture is checked.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from reward_models import load_reward_model

FOLDERS = {
    "pickscore": lambda d: {"checkpoint": d},
    "hpsv2": lambda d: {"checkpoint": d},
    "hpsv2.0": lambda d: {"checkpoint": d, "version": "v2.0"},
    "imagereward": lambda d: {"checkpoint": d, "tokenizer": d / "bert-base-uncased"},
    "aesthetic": lambda d: {"head": d / "sac+logos+ava1-l14-linearMSE.pth", "clip": d / "clip-vit-large-patch14"},
    "aesthetic-v1": lambda d: {
        "version": "v1",
        "head": d / "sa_0_4_vit_l_14_linear.pth",
        "clip": d / "clip-vit-large-patch14",
    },
    "mps": lambda d: {"checkpoint": d, "backbone": d / "clip-vit-h-14"},
    "hpsv3": lambda d: {"checkpoint": d, "backbone": d / "qwen2-vl-7b", "instruction": d / "instruction.txt"},
    "clip": lambda d: {"tag": str(d / "open_clip_model.safetensors")},
}
TOLERANCE = {
    "pickscore": 0.02,
    "hpsv2": 5e-4,
    "hpsv2.0": 5e-4,
    "imagereward": 5e-3,
    "aesthetic": 5e-3,
    "aesthetic-v1": 5e-3,
    "mps": 0.05,
    "hpsv3": 0.1,
    "clip": 2e-3,
}
PLAUSIBLE = {
    "pickscore": (10, 32),
    "hpsv2": (0.05, 0.45),
    "hpsv2.0": (0.05, 0.45),
    "imagereward": (-4, 4),
    "aesthetic": (1, 10),
    "aesthetic-v1": (1, 10),
    "mps": (-5, 40),
    "hpsv3": (-20, 20),
    "clip": (0, 1.5),
}


def folder_of(name: str, config: pytest.Config) -> Path:
    root = config.getoption("--weights-dir")
    if root is None:
        pytest.skip("give the folder of published weights with --weights-dir")
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="module", params=list(FOLDERS))
def published(request):
    folder = folder_of(request.param, request.config)
    base = request.param.removesuffix(".0").removesuffix("-v1")
    return request.param, folder, load_reward_model(base, **FOLDERS[request.param](folder))


def drawn(color: str) -> Image.Image:
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).ellipse((96, 96, 416, 416), fill=color)
    return image


@pytest.mark.weights
def test_scores_lie_where_they_are_known_to_lie_and_follow_the_prompt(published):
    name, _, scorer = published
    images, prompts = [drawn("red"), drawn("blue")] * 2, ["a red circle"] * 2 + ["a blue circle"] * 2
    scores = scorer.score(images, prompts)
    low, high = PLAUSIBLE[name]
    assert bool(((scores > low) & (scores < high)).all()), scores
    assert torch.allclose(
        scores, torch.cat([scorer.score([i], [p]) for i, p in zip(images, prompts, strict=True)]), atol=1e-2
    )
    if not name.startswith("aesthetic"):
        assert scores[0] + scores[3] > scores[1] + scores[2], "the right colour is preferred"


@pytest.mark.weights
def test_scores_are_those_of_the_makers_code(published, record_property):
    name, folder, scorer = published
    if not (folder / "reference.json").is_file():
        pytest.skip(f"{folder} has no reference.json")
    rows = json.loads((folder / "reference.json").read_text())
    scores = scorer.score([folder / row["image"] for row in rows], [row["prompt"] for row in rows])
    error = (scores - torch.tensor([row["score"] for row in rows])).abs()
    record_property("largest_error", float(error.max()))
    assert error.max() < TOLERANCE[name], f"{name}: largest error {error.max():.4g} over {len(rows)} pictures"

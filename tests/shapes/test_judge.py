"""The learned judge: its files, PickScore's formula on open_clip's own classes, its accuracy, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from diffalign.shapes import parse, sample_captions
from diffalign.shapes.judge import ShapesJudge, judge_folder
from reward_models import RewardModelError, load_reward_model
from tests import scripts
from tests.shapes.drawn import renders

ROOT = Path(__file__).parents[2]
CAPTIONS = sample_captions(40, seed=99, held_out=True)


@pytest.fixture(scope="module")
def judge():
    return load_reward_model("shapes-judge", device="cpu")


@pytest.fixture(scope="module")
def script():
    return scripts.script("training/train_shapes_judge.py")


# --- the embedded judge ------------------------------------------------------------------------------------------


def test_the_weights_are_small_halves():
    weights = load_file(judge_folder() / "open_clip_model.safetensors")
    assert sum(path.stat().st_size for path in judge_folder().iterdir()) <= 4e6
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.float16}


def test_scores_follow_pickscores_formula(judge):
    pictures, prompts = renders(CAPTIONS[:8]), CAPTIONS[:8]
    scores = judge.score(pictures, prompts)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{judge_folder()}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{judge_folder()}")
    with torch.no_grad():
        for score, picture, prompt in zip(scores, pictures, prompts, strict=True):  # one at a time
            seen, _, scale = model.eval()(transform(picture)[None], None)
            told = model.encode_text(tokenizer([prompt]), normalize=True)
            assert float(score) == pytest.approx(float(scale * (seen * told).sum()), abs=1e-4)
    assert torch.equal(scores, judge.score(pictures, prompts))
    alone = torch.cat([judge.score([picture], [prompt]) for picture, prompt in zip(pictures, prompts, strict=True)])
    assert torch.allclose(scores, alone, atol=1e-4)


def test_half_precision_changes_little(judge):
    pictures = renders(CAPTIONS)
    half = ShapesJudge(device="cpu", dtype=torch.bfloat16).score(pictures, CAPTIONS)
    full = judge.score(pictures, CAPTIONS)
    assert (half - full).abs().max() < 0.1 * (full.max() - full.min())


def test_prompts_of_another_world_are_missing(judge):
    scores = judge.score(renders(CAPTIONS[:2]), [CAPTIONS[0], "a photo of a cat"])
    assert scores.isnan().tolist() == [False, True]


def test_it_prefers_the_right_picture_mostly(judge):
    """Renders of held-out combinations against renders of another such caption."""
    right = judge.score(renders(CAPTIONS), CAPTIONS)
    wrong = judge.score(renders(CAPTIONS[1:] + CAPTIONS[:1], seed=1), CAPTIONS)
    assert (right > wrong).float().mean() >= 0.85


def test_the_record_says_what_was_measured():
    record = json.loads((judge_folder() / "record.json").read_text())
    measured = record["export"]["held-out"]["all"]
    low, high = measured["ci95"]
    assert low < measured["accuracy"] < high and measured["n"] > 500
    assert f"{measured['accuracy']:.3f}" in (ROOT / "docs" / "shapes-judge.md").read_text()


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(RewardModelError, match="train_shapes_judge"):
        load_reward_model("shapes-judge", folder=tmp_path)


# --- how it is trained -------------------------------------------------------------------------------------------


def test_the_loss_by_hand(script):
    logits = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
    own = torch.tensor([[0, 1]])
    scores = torch.tensor([[0.5, 1.3, 0.5]])  # picture 1 is better than 0; 2 ties with 0
    loss = script.preference_loss(logits, scores, own)

    def cross_entropy(gap, wins):
        p = 1 / (1 + np.exp(-gap))
        return -wins * np.log(p) - (1 - wins) * np.log(1 - p)

    siblings = [cross_entropy(0, 0.5), cross_entropy(1, 0), cross_entropy(-1, 1), cross_entropy(0, 0.5)]
    everyone = siblings + [cross_entropy(3, 0.5), cross_entropy(2, 1)]
    assert float(loss.detach()) == pytest.approx(np.mean(siblings) + np.mean(everyone), abs=1e-6)
    loss.backward()
    assert logits.grad[0, 1] < 0 < logits.grad[0, 0]  # a step down the gradient favours the better picture


def test_perturbed_captions_stay_out_of_the_held_out_ones(script):
    rng = np.random.default_rng(0)
    for caption in map(parse, sample_captions(60, seed=1)):
        for _ in range(5):
            other = script.perturb(caption, rng)
            assert other != caption and not other.held_out
            assert parse(str(other)) == other


def test_a_short_training_is_exported_and_loads(script, tmp_path):
    pictures = script.draw_renders(8, 4, seed=0)
    settings = {"seed": 0, "width": 8, "train_steps": 3, "batch_size": 4, "lr": 1e-3}
    runs = []
    for name in ("first", "again"):
        args = SimpleNamespace(output_dir=tmp_path / name, weights_dir=tmp_path / name / "half", **settings)
        script.train(args, [pictures, pictures])
        runs.append(load_file(tmp_path / name / "model" / "open_clip_model.safetensors"))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])  # one seed, one model
    small = ShapesJudge(folder=tmp_path / "first" / "model", device="cpu")
    assert small.score(renders(CAPTIONS[:3]), CAPTIONS[:3]).isfinite().all()

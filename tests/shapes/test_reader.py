"""The learned reader: what it reads in drawn pictures, how it scores, and how it is trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageOps
from safetensors.torch import load_file

from diffalign.shapes import sample_captions
from diffalign.shapes.checker import read
from diffalign.shapes.grammar import BACKGROUNDS, COLORS, SHAPES
from diffalign.shapes.reader import CELLS, ReaderNet, as_pixels, reader_folder, things_of
from reward_models import RewardModelError, load_reward_model
from tests.scripts import script
from tests.shapes.drawn import renders

ROOT = Path(__file__).parents[2]
CAPTIONS = sample_captions(60, seed=98, held_out=True)


@pytest.fixture(scope="module")
def reader():
    return load_reward_model("shapes-reader", device="cpu")


@pytest.fixture(scope="module")
def training():
    return script("training/train_shapes_reader.py")


# --- the embedded reader -----------------------------------------------------------------------------------------


def test_the_weights_are_small_halves():
    assert sum(path.stat().st_size for path in reader_folder().iterdir()) <= 1e6
    assert {value.dtype for value in load_file(reader_folder() / "model.safetensors").values()} == {torch.float16}


def test_it_tells_true_captions_from_false_ones(reader):
    pictures = renders(CAPTIONS)
    assert reader.score(pictures, CAPTIONS).mean() >= 0.9
    assert reader.score(pictures, CAPTIONS[1:] + CAPTIONS[:1]).mean() <= 0.05


def test_it_reads_the_thing_that_was_drawn(reader):
    captions = [f"a {color} {shape} on a gray background" for color in COLORS for shape in SHAPES]
    read = reader.read(renders(captions))
    found = [f"a {thing.color} {thing.shape} on a gray background" for _, things in read for thing in things]
    assert len(found) == len(captions)
    assert np.mean([one == other for one, other in zip(found, captions, strict=True)]) >= 0.9
    assert {background for background, _ in read} == {"gray"}


def test_a_mirrored_picture_has_its_things_on_the_other_side(reader):
    (picture,) = renders(["a red circle left of a blue ring"])
    claims = ["a red circle left of a blue ring", "a red circle right of a blue ring"]
    mirrored = ImageOps.mirror(picture)
    assert reader.score([picture, picture, mirrored, mirrored], claims * 2).tolist() == [1, 0, 0, 1]


def test_a_picture_has_its_score_in_any_batch(reader):
    pictures = renders(CAPTIONS[:9])
    together = reader.score(pictures, CAPTIONS[:9])
    assert together.tolist() == [float(reader.score([p], [t])) for p, t in zip(pictures, CAPTIONS[:9], strict=True)]


def test_prompts_of_another_world_are_missing(reader):
    scores = reader.score(renders(CAPTIONS[:2]), [CAPTIONS[0], "a photo of a cat"])
    assert scores.isnan().tolist() == [False, True]


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(RewardModelError, match="train_shapes_reader"):
        load_reward_model("shapes-reader", folder=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RewardModelError, match="cannot load"):
        load_reward_model("shapes-reader", folder=tmp_path)


def test_the_page_says_what_was_measured():
    measured = json.loads((reader_folder() / "record.json").read_text())["measured"]
    page = (ROOT / "docs" / "shapes-reader.md").read_text()
    assert all(f"{value:.3f}" in page for key, value in measured.items() if key != "n")


# --- how it is trained -------------------------------------------------------------------------------------------


def test_perfect_predictions_give_the_things_back(training):
    """What the targets say, read as a prediction, is the scene."""
    wanted = training.targets(2, [(1, 3, 10.0, 20.0, 6.0), (training.NONE_COLOR, training.NONE_SHAPE, 50.0, 41.0, 9.0)])
    classes = wanted["classes"].clamp(min=0)
    predicted = {
        "centre": (wanted["centre"] * 20 - 10)[None, None],
        "box": wanted["box"][None],
        "color": torch.nn.functional.one_hot(classes[0], len(COLORS) + 1).permute(2, 0, 1)[None].float(),
        "shape": torch.nn.functional.one_hot(classes[1], len(SHAPES) + 1).permute(2, 0, 1)[None].float(),
        "background": torch.eye(3)[wanted["background"]][None],
    }
    ((background, things),) = things_of(predicted)
    assert background == "black"
    assert [(t.color, t.shape, t.x, t.y, t.half) for t in things] == [
        (None, None, 50.0, 41.0, 9.0),
        ("green", "cross", 10.0, 20.0, 6.0),
    ]


def test_cells_beside_a_centre_may_say_anything(training):
    wanted = {name: value[None] for name, value in training.targets(0, [(0, 0, 30.0, 30.0, 8.0)]).items()}
    torch.manual_seed(0)
    predicted = ReaderNet()(torch.rand(1, 3, 64, 64))
    predicted = {name: value.detach().requires_grad_() for name, value in predicted.items()}
    training.loss_of(predicted, wanted).backward()
    slope = predicted["centre"].grad[0, 0]
    row = column = 30 // 4
    assert slope[row, column] < 0 and (slope[row, column + 1], slope[row - 1, column - 1]) == (0, 0)
    assert (slope > 0).sum() == CELLS**2 - 9  # everywhere else a centre is wrong


def test_classes_and_boxes_are_learned_where_a_thing_is_and_nowhere_else(training):
    wanted = {name: value[None] for name, value in training.targets(1, [(4, 2, 31.0, 29.0, 8.0)]).items()}
    predicted = {name: torch.zeros_like(value) for name, value in ReaderNet()(torch.rand(1, 3, 64, 64)).items()}
    predicted = {name: value.requires_grad_() for name, value in predicted.items()}
    training.loss_of(predicted, wanted).backward()
    row = column = 30 // 4
    for name, index in (("color", 4), ("shape", 2)):
        slope = predicted[name].grad[0]
        here = slope[:, row, column].clone()
        assert here[index] < 0 and (here > 0).sum() == len(here) - 1  # a step down the gradient favours the right class
        assert slope.count_nonzero() == len(here)
    slope = predicted["box"].grad[0]
    assert slope.count_nonzero() == 3 and slope[:, row, column].sign().tolist() == [-1, 1, -1]
    assert predicted["background"].grad.sign().tolist() == [[1, -1, 1]]


def test_things_are_what_their_labels_say(training):
    """Single things against the checker, which has no part in the training: true ones are read as labelled."""
    rng, right = np.random.default_rng(3), {True: [], False: []}
    while len(right[True]) < 60 or len(right[False]) < 20:
        picture, background, things = training.scene(rng)
        if len(things) != 1 or things[0][4] < 8:
            continue
        color, shape, x, y, half = things[0]
        name, found = read(picture)
        assert name == list(BACKGROUNDS)[background]
        label = ([*COLORS, None][color], [*SHAPES, None][shape])
        right[None not in label].append((found[0].color, found[0].shape) == label if len(found) == 1 else False)
        if None not in label and len(found) == 1:
            assert (found[0].x, found[0].y, found[0].half) == pytest.approx((x, y, half), abs=1.5)
    assert np.mean(right[True]) > 0.9 and np.mean(right[False]) > 0.5


def test_every_second_scene_passes_through_the_autoencoder(training):
    pixels, _ = training.make_scenes(6, 3)
    rng = np.random.default_rng(3)
    drawn = torch.from_numpy(np.stack([np.asarray(training.scene(rng)[0]) for _ in range(6)])).permute(0, 3, 1, 2)
    assert [torch.equal(a, b) for a, b in zip(pixels, drawn, strict=True)] == [True, False] * 3
    assert (pixels[1::2].float() - drawn[1::2].float()).abs().mean() < 20  # the same scene still


def test_a_short_training_learns_and_repeats_itself(training):
    first, again = training.train(64, 2, seed=0), training.train(64, 2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    pixels, wanted = training.make_scenes(64, 1)
    fresh = ReaderNet()
    with torch.no_grad():
        losses = [training.loss_of(model(pixels / 127.5 - 1), wanted) for model in (first, fresh)]
    assert losses[0] < losses[1]
    assert as_pixels(renders(CAPTIONS[:2])).shape == (2, 3, 64, 64)

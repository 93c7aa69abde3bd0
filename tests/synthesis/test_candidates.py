"""Pictures that must not be ranked are recognised, and good ones are not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from diffalign.synthesis.candidates import Candidate, distance, encode, mark_duplicates, problem_of, thumbnail
from diffalign.synthesis.sampling import UNSAFE, generate_images
from tests.tiny import tiny_sd


def noise(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def candidate(image):
    return Candidate("p", {}, encode(image, "png", None), problem_of(image), thumbnail(image))


@pytest.mark.parametrize(("color", "problem"), [((0, 0, 0), "black"), ((200, 10, 10), "blank"), ((255,) * 3, "blank")])
def test_even_pictures_are_blank(color, problem):
    image = Image.new("RGB", (64, 64), color)
    assert problem_of(image) == problem
    ImageDraw.Draw(image).point((3, 3), fill=(100, 200, 100))
    assert problem_of(image) == ""


def test_values_that_are_not_finite_are_seen_before_they_turn_black():
    pipeline = tiny_sd()
    with torch.no_grad():
        pipeline.vae.post_quant_conv.weight.fill_(math.nan)
    (image,) = generate_images(pipeline, ["a cat"], [0], steps=1, guidance=1.0)
    assert problem_of(image) == "not finite"
    blacked_out = noise()
    blacked_out.info[UNSAFE] = True
    assert problem_of(blacked_out) == "flagged by the safety checker"
    assert problem_of(generate_images(tiny_sd(), ["a cat"], [0], steps=1, guidance=1.0)[0]) == ""


def test_repeats_are_found_whatever_small_noise_is_on_them():
    first = noise()
    speckled = Image.fromarray(
        np.clip(np.asarray(first, dtype=int) + np.eye(64, dtype=int)[..., None], 0, 255).astype("uint8")
    )
    marked = mark_duplicates([candidate(p) for p in (first, noise(1), speckled, Image.new("RGB", (64, 64)))], 1.0)
    assert [c.problem for c in marked] == ["", "", "duplicate of candidate 0", "black"]
    exact = mark_duplicates([candidate(p) for p in (first, speckled, first)], 0.0)
    assert [c.problem for c in exact] == ["", "", "duplicate of candidate 0"]
    unsafe = replace(candidate(first), problem="unsafe")
    assert mark_duplicates([unsafe, candidate(first)], 1.0)[1].problem == ""  # what is left out hides nothing
    assert math.isnan(distance(b"", thumbnail(first)))


@pytest.mark.parametrize(("kind", "quality", "exact"), [("png", None, True), ("webp", None, True), ("jpeg", 90, False)])
def test_encodings(kind, quality, exact):
    import io

    data = encode(noise(), kind, quality)
    again = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)
    assert (again == np.asarray(noise(), dtype=int)).all() == exact

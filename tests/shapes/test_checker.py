"""The checker reads pictures back: right ones pass, wrong and malformed ones do not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffalign.shapes.checker import check, read
from diffalign.shapes.grammar import COLORS, parse, sample_caption
from diffalign.shapes.renderer import SIZE, render
from diffalign.shapes.scorer import ShapesScorer, ShapesStrictScorer

GRAY = (150, 150, 150)


@pytest.fixture(scope="module")
def renders():
    """300 true pictures of each split."""
    rng = np.random.default_rng(2026)
    captions = [sample_caption(rng, held_out=bool(i % 2)) for i in range(600)]
    return [(str(caption), render(caption, rng)) for caption in captions]


def canvas(*shapes, size=SIZE, background=GRAY):
    """A picture drawn by hand: (kind, box, colour name) in 64-pixel coordinates, smoothed like the renderer's."""
    image = Image.new("RGB", (SIZE * 4, SIZE * 4), background)
    pen = ImageDraw.Draw(image)
    for kind, box, color in shapes:
        getattr(pen, kind)([4 * v for v in box], fill=COLORS[color])
    return image.resize((size, size), Image.Resampling.BOX)


def test_at_least_99_per_cent_of_600_true_pictures_pass(renders):
    by_split = {False: [], True: []}
    for text, image in renders:
        by_split[parse(text).held_out].append(check(image, text).strict)
    assert all(len(verdicts) == 300 for verdicts in by_split.values())
    assert all(np.mean(verdicts) >= 0.99 for verdicts in by_split.values())


def test_no_picture_passes_under_another_pictures_caption(renders):
    wrong = [(a, image) for (a, _), (b, image) in zip(renders, renders[1:] + renders[:1], strict=True) if a != b]
    passed = [(text, image) for text, image in wrong if check(image, text).strict]
    # A picture of "a red ring on the left" truly shows "a red ring": only such pairs may pass, and here are none.
    assert len(wrong) > 590
    assert passed == []


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("a red circle on the left", "a red circle on the right"),
        ("a red circle above a blue ring", "a red circle below a blue ring"),
        ("two red circles", "three red circles"),
        ("a red circle", "a orange circle"),
        ("a red square", "a red cross"),
        ("a red circle above a blue ring", "a blue circle above a red ring"),
        ("a red circle on a white background", "a red circle on a gray background"),
    ],
)
def test_one_false_claim_is_caught_and_soft_falls_by_its_share(picture, caption):
    for seed in range(10):
        image = render(parse(picture), np.random.default_rng(seed))
        verdict = check(image, caption)
        assert not verdict.strict
        assert 0 < verdict.soft < 1
        assert verdict.soft == pytest.approx(np.mean(list(verdict.claims.values())))


def test_noise_in_the_pixels_and_a_larger_copy_change_nothing(renders):
    rng = np.random.default_rng(0)
    for text, image in renders[:100]:
        noisy = np.clip(np.asarray(image) + rng.normal(0, 5, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
        larger = image.resize((256, 256), Image.Resampling.NEAREST)
        plain = check(image, text)
        assert check(larger, text) == plain
        assert check(noisy, text).strict == plain.strict
        assert check(np.asarray(image), text) == plain


def test_mirroring_swaps_left_and_right(renders):
    swap = {"left": "right", "right": "left"}
    for text, image in renders:
        words = [swap.get(word, word) for word in text.split()]
        if words != text.split() and check(image, text).strict:
            mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            assert check(mirrored, " ".join(words)).strict
            assert not check(mirrored, text).strict


@pytest.mark.parametrize("caption", ["a red circle", "two red circles", "a red circle above a blue ring", "a red ring"])
def test_blank_and_noise_never_pass(caption):
    rng = np.random.default_rng(0)
    for background in (GRAY, (245, 245, 245), (20, 20, 20), COLORS["red"]):
        assert not check(canvas(background=background), caption).strict
    for _ in range(10):
        assert not check(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8), caption).strict
        speckles = np.full((SIZE, SIZE, 3), 150, dtype=np.uint8)
        speckles[rng.random((SIZE, SIZE)) < 0.2] = COLORS["red"]
        assert not check(speckles, caption).strict


def test_merged_shapes_are_not_two_shapes():
    apart = canvas(("ellipse", (8, 22, 28, 42), "red"), ("ellipse", (36, 22, 56, 42), "red"))
    assert check(apart, "two red circles").strict
    merged = canvas(("ellipse", (14, 22, 34, 42), "red"), ("ellipse", (30, 22, 50, 42), "red"))
    assert not check(merged, "two red circles").strict
    assert not check(merged, "a red circle").strict


def test_a_half_drawn_or_stretched_shape_is_no_shape():
    for kind, box in (("pieslice", (22, 22, 42, 42)), ("ellipse", (12, 24, 52, 40))):
        image = Image.new("RGB", (SIZE * 4, SIZE * 4), GRAY)
        pen = ImageDraw.Draw(image)
        scaled = [4 * v for v in box]
        if kind == "pieslice":
            pen.pieslice(scaled, 0, 180, fill=COLORS["red"])
        else:
            pen.ellipse(scaled, fill=COLORS["red"])
        assert not check(image.resize((SIZE, SIZE), Image.Resampling.BOX), "a red circle").strict


@pytest.mark.parametrize("second", ["blue", "yellow", "green"])
def test_a_shape_of_two_colours_is_not_of_one(second):
    image = canvas(("rectangle", (20, 20, 44, 44), "red"), ("rectangle", (32, 20, 44, 44), second))
    assert not check(image, "a red square").strict
    assert not check(image, f"a {second} square").strict


def test_an_extra_thing_is_counted():
    image = canvas(("ellipse", (8, 8, 28, 28), "red"), ("rectangle", (40, 40, 58, 58), "blue"))
    assert not check(image, "a red circle").strict
    assert len(read(image)[1]) == 2


def test_scorers_agree_with_the_checker_and_leave_other_prompts_unjudged(renders):
    texts = [renders[0][0], renders[1][0], "a photograph of a cat"]
    images = [renders[0][1], renders[0][1], renders[0][1]]
    verdicts = [check(images[0], texts[0]), check(images[1], texts[1])]
    soft, strict = ShapesScorer().score(images, texts), ShapesStrictScorer().score(images, texts)
    assert strict[:2].tolist() == [float(v.strict) for v in verdicts] == [1.0, 0.0]
    assert soft[:2].tolist() == pytest.approx([v.soft + 0.3 * v.strict for v in verdicts])
    assert soft[2].isnan() and strict[2].isnan()
    assert ShapesScorer().identity["code_version"] != ShapesStrictScorer().identity["code_version"]


@pytest.mark.parametrize("edge", [48, 80, 96, 128, 200, 256])
def test_pictures_of_other_sizes_are_read_as_well(renders, edge):
    passed = [check(image.resize((edge, edge), Image.Resampling.BICUBIC), text).strict for text, image in renders[:100]]
    assert np.mean(passed) >= 0.99


def test_oblong_pictures_are_refused(renders):
    text, image = renders[0]
    with pytest.raises(ValueError, match="square; got 96 x 64"):
        check(image.resize((96, 64)), text)

"""The language of the shapes world."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from diffalign.shapes import grammar
from diffalign.shapes.grammar import (
    ALL_THINGS,
    BACKGROUNDS,
    COUNTS,
    HELD_OUT,
    POSITIONS,
    RELATIONS,
    SEEN,
    Caption,
    parse,
    sample_caption,
    sample_captions,
)


def every_caption():
    for background in (None, *BACKGROUNDS):
        for thing in ALL_THINGS:
            for position in (None, *POSITIONS):
                yield Caption("single", (thing,), 1, None, position, background)
            for number in COUNTS:
                yield Caption("count", (thing,), number, None, None, background)
        for first, second, relation in product(ALL_THINGS, ALL_THINGS, RELATIONS):
            if first != second:
                yield Caption("pair", (first, second), 2, relation, None, background)


def test_every_caption_is_read_back_and_no_two_are_written_alike():
    captions = list(every_caption())
    texts = {str(caption) for caption in captions}
    assert len(texts) == len(captions) > 14_000
    assert all(parse(str(caption)) == caption for caption in captions)


def test_parsing_forgives_case_spaces_and_the_full_stop():
    assert parse("  An  Orange circle on the LEFT. ") == parse("a orange circle on the left")


@pytest.mark.parametrize(
    "text", ["", "a cat", "a red hexagon", "two red circle", "a red circle on a pink background", "a red circle circle"]
)
def test_other_sentences_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match="expected for example"):
        parse(text)


def test_seen_captions_never_name_a_held_out_combination_and_held_out_ones_always_do():
    assert len(HELD_OUT) == 6
    assert set(SEEN) | HELD_OUT == set(ALL_THINGS)
    assert not set(SEEN) & HELD_OUT
    rng = np.random.default_rng(0)
    seen = [sample_caption(rng) for _ in range(3000)]
    assert not any(set(caption.things) & HELD_OUT for caption in seen)
    assert {thing for caption in seen for thing in caption.things} == set(SEEN)
    held = [sample_caption(rng, held_out=True) for _ in range(3000)]
    assert all(set(caption.things) & HELD_OUT for caption in held)
    assert {thing for caption in held for thing in caption.things} >= HELD_OUT


def test_every_colour_shape_and_word_appears_in_training():
    assert {color for color, _ in SEEN} == {color for color, _ in ALL_THINGS}
    assert {shape for _, shape in SEEN} == {shape for _, shape in ALL_THINGS}


def test_sampled_lists_are_reproducible_and_without_repeats():
    first, again = sample_captions(300, 7), sample_captions(300, 7)
    assert first == again
    assert len(set(first)) == 300
    assert first != sample_captions(300, 8)


def test_asking_for_more_captions_than_there_are_says_so(monkeypatch):
    monkeypatch.setattr(grammar, "sample_caption", lambda rng, held_out: parse("a red circle"))
    with pytest.raises(ValueError, match="fewer than 2"):
        sample_captions(2, 0)


def test_weights_choose_the_kinds():
    rng = np.random.default_rng(0)
    assert {sample_caption(rng, kinds={"count": 1.0}).kind for _ in range(50)} == {"count"}

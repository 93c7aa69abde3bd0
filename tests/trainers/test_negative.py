"""Any offline method with the preference reversed (Diffusion-NPO)."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.data import load_preferences
from diffalign.data.pairs import Example
from diffalign.errors import CheckpointError
from tests.trainers.conftest import METHODS, preference_rows


def test_an_example_reversed():
    example = Example(3, (2, 0, 1), 0.75, (1.0, 0.5, 0.2))
    other = example.reversed()
    assert other == Example(3, (1, 0, 2), 0.75, (0.8, 0.5, 0.0))
    assert math.isclose(other.margin, example.margin) and other.reversed().candidates == example.candidates


@pytest.mark.parametrize("method", METHODS)
def test_negative_trains_on_the_pair_the_other_way_round(make, method):
    """The same draws, first and last image exchanged; DPO starts at ln 2 whichever is preferred."""
    settings = {"draws_per_row": 1, "batch_size": 4} | ({"score": "clip"} if method == "smpo" else {})
    plain, negative = make(method, "plain", **settings), make(method, "negative", negative=True, **settings)
    first, second = (t.noised(t.collate(t.stream.step(0))) for t in (plain, negative))
    assert first.row_ids == second.row_ids
    assert torch.equal(first.latents.flip(1), second.latents)
    assert torch.equal(first.noise.flip(1), second.noise) and torch.equal(first.timesteps, second.timesteps)
    torch.testing.assert_close(1 - first.preference.flip(1), second.preference)
    assert torch.equal(first.probability, second.probability)
    errors = torch.rand(4, first.shape[1])
    reference = torch.rand(4, first.shape[1])
    here = negative.compute(errors, reference, second).loss
    if method in ("dpo", "smpo", "mapo"):  # exchanging the labels of a pair is exchanging its errors
        there = plain.compute(errors, reference, first).loss
        assert not torch.allclose(here, there + 1e-3)
        exchanged = plain.compute(errors.flip(1), reference.flip(1), first).loss
        torch.testing.assert_close(negative.compute(errors.flip(1), reference.flip(1), second).loss, exchanged)
    if method == "dpo":
        assert math.isclose(negative.optimizer_step()["loss"], math.log(2), rel_tol=1e-6)


def test_ties_are_dropped(make):
    rows = preference_rows(3)
    rows[0]["preference"] = [0.5, 0.5]
    trainer = make("dpo", negative=True, dataset=load_preferences(rows))
    assert len(trainer.examples) == 2 and all(example.margin > 0 for example in trainer.examples)


def test_a_run_is_not_continued_the_other_way_round(make):
    make("dpo", max_steps=1).train()
    with pytest.raises(CheckpointError, match="its negative is None, this run's is True.*same data, negative"):
        make("dpo", max_steps=2, resume="latest", negative=True).train()
    make("dpo", "negative", max_steps=1, negative=True).train()
    with pytest.raises(CheckpointError, match="its negative is True, this run's is None"):
        make("dpo", "negative", max_steps=2, resume="latest").train()

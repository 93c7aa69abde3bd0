from __future__ import annotations

import torch

from diffalign.randomness import keyed_normal, keyed_permutation, keyed_seed, keyed_uniform


def test_every_part_of_the_key_matters():
    keys = [
        (0, 1, "row", "noise"),
        (1, 0, "row", "noise"),
        (0, 1, "row", "timestep"),
        (0, "1", "row", "noise"),
        (0, 1, "row"),
    ]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)


def test_the_same_key_gives_the_same_draw_whatever_ran_before():
    first = keyed_normal((3, 4), 0, 5, "row", "noise")
    torch.randn(7)
    keyed_normal((2,), 9)
    assert torch.equal(keyed_normal((3, 4), 0, 5, "row", "noise"), first)


def test_draws_look_random():
    values = torch.tensor([keyed_uniform("u", i) for i in range(4000)])
    assert abs(values.mean() - 0.5) < 0.02
    assert values.min() >= 0
    assert values.max() < 1
    assert sorted(keyed_permutation(50, "p")) == list(range(50)) != keyed_permutation(50, "p")

"""What goes wrong is refused, or replaced row by row and reported; never silent."""

from __future__ import annotations

import pytest
import torch

from diffalign.diffusion import denoise, inversion_grid, invert
from diffalign.errors import ConfigError, DivergenceError

from .toys import curved, normal, schedule_of

T = torch.tensor([300, 300, 300])
OK = normal(3, 4, 2, 2)


def spoiled(schedule, change):
    """The curved network, with ``change(out, call, rows)`` applied to its answers; call counts within a step."""
    calls: dict[int, int] = {}

    def predict(x, time, rows):
        at = int(time[0])
        calls[at] = calls.get(at, -1) + 1
        return change(curved(schedule)(x, time, rows), calls[at], rows)

    return predict


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [1, 2])
def test_a_row_whose_iterate_is_not_finite_falls_back_and_says_so(value, call):
    schedule = schedule_of()

    def change(out, n, rows):
        out[rows == 1] = torch.where(torch.tensor(n >= call), value, out[rows == 1])
        return out

    found = invert(spoiled(schedule, change), OK, T, schedule, steps=3, renoise=2)
    clean = invert(curved(schedule), OK, T, schedule, steps=3, renoise=2)
    assert found.fell_back.tolist() == [False, True, False] and not clean.fell_back.any()
    assert torch.equal(found.latents[[0, 2]], clean.latents[[0, 2]])
    # the first output is plain DDIM, whose move is unknown when the second is broken
    plain = invert(curved(schedule), OK, T, schedule, steps=3, renoise=0)
    assert torch.equal(found.latents[1], plain.latents[1])
    assert found.residual[1].isfinite() == (call == 2)
    wild = invert(spoiled(schedule, change), OK, T, schedule, steps=3, renoise=2, guard=False)
    assert not wild.latents[1].isfinite().any() and not wild.fell_back.any()


def test_a_row_that_diverges_keeps_its_best_iterate():
    """A network that answers too strongly: every iteration moves further than the one before."""
    schedule, t = schedule_of(), torch.tensor([80, 80])
    strength = torch.tensor([0.5, 9.0], dtype=torch.float64).view(-1, 1, 1, 1)

    def predict(x, time, rows):
        return strength[rows] * x

    x0 = normal(2, 4, 2, 2)
    found = invert(predict, x0, t, schedule, steps=1, renoise=6)
    plain = invert(predict, x0, t, schedule, steps=1, renoise=0)
    wild = invert(predict, x0, t, schedule, steps=1, renoise=6, guard=False)
    assert found.fell_back.tolist() == [False, True]
    assert torch.equal(found.latents[1], plain.latents[1]) and torch.equal(found.latents[0], wild.latents[0])
    assert wild.latents[1].norm() > 20 * found.latents[1].norm()
    # the residual belongs to what was returned: walking down from it misses the start by just that
    a, b = (table[81] for table in schedule.levels(torch.float64))
    again = a * x0[1] + b * 9 * found.latents[1]
    assert torch.allclose(found.residual[1], (again - found.latents[1]).norm() / found.latents[1].norm())


def test_the_best_iterate_is_the_one_that_moves_least():
    """Moves of 1/4, then 1/40, then 1/2: the second iterate is the best known."""
    schedule, t, x0 = schedule_of(), torch.tensor([80]), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    answers = [1.0, 1.25, 1.275, 1.775]
    predict = spoiled(schedule, lambda out, n, rows: torch.full_like(out, answers[n]))
    found = invert(predict, x0, t, schedule, steps=1, renoise=3)
    a, b = (table[81] for table in schedule.levels(torch.float64))
    assert found.fell_back.tolist() == [True]
    assert float(found.latents) == pytest.approx(float(a + b * 1.25))
    assert float(found.residual) == pytest.approx(float(b * 0.025 / (a + b * 1.25)))


def test_a_plateau_is_no_divergence():
    """Moves of 1/4, 1/4 and 3/10: the last iterate stays."""
    schedule, t, x0 = schedule_of(), torch.tensor([80]), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    answers = [1.0, 1.25, 1.5, 1.8]
    predict = spoiled(schedule, lambda out, n, rows: torch.full_like(out, answers[n]))
    found = invert(predict, x0, t, schedule, steps=1, renoise=3)
    a, b = (table[81] for table in schedule.levels(torch.float64))
    assert not found.fell_back.any() and float(found.latents) == pytest.approx(float(a + b * 1.8))


def test_rounding_is_no_divergence():
    """Converged iterates tremble by a few units of the last place; so does a bf16 network."""
    schedule = schedule_of()
    x0, t = normal(32, 4, 4, 4, dtype=torch.float32), torch.arange(10, 970, 30)
    for dtype in (torch.float32, torch.bfloat16):

        def predict(x, time, rows, dtype=dtype):
            return (0.3 * x + 0.2 * torch.sin(x)).to(dtype)

        found = invert(predict, x0, t, schedule, renoise=12)
        assert not found.fell_back.any()
        assert found.residual.max() < 4 * torch.finfo(dtype).eps


def test_a_broken_network_is_named_with_its_rows():
    schedule = schedule_of()

    def change(out, n, rows):
        out[rows == 2] = float("nan")
        return out

    with pytest.raises(DivergenceError, match=r"not finite \(row 2 at t=74\).*guard=False"):
        invert(spoiled(schedule, change), OK, T, schedule, steps=10)
    for renoise in (0, 1):
        with pytest.raises(DivergenceError, match="row 2"):
            invert(spoiled(schedule, change), OK, T, schedule, renoise=renoise)
    taken = invert(spoiled(schedule, change), OK, T, schedule, guard=False)
    assert taken.latents[2].isnan().all() and taken.latents[:2].isfinite().all()
    assert taken.residual[2].isnan() and not taken.fell_back.any()
    terminal = schedule_of("v_prediction", zero_terminal_snr=True)

    def late(x, time, rows):
        return torch.where(time.view(-1, 1, 1, 1) >= 500, float("nan"), 0.0) * x

    with pytest.raises(DivergenceError, match="row 0 at t=499|row 0 at t=599"):
        invert(lambda x, time, rows: late(x, time + 1, rows), OK[:1], torch.tensor([999]), terminal, steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1; got 0"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"renoise": -1}, "renoise must be a whole number of at least 0; got -1"),
        ({"renoise": 1, "weights": [1.0]}, "renoise \\+ 1 = 2 numbers"),
        ({"renoise": 1, "weights": [0.5, 0.6]}, "sum to 1; got \\[0.5, 0.6\\]"),
        ({"renoise": 1, "weights": [1.5, -0.5]}, "at least 0"),
        ({"renoise": 1, "weights": [float("nan"), 1.0]}, "sum to 1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        invert(curved(schedule_of()), OK, T, schedule_of(), **options)


@pytest.mark.parametrize("walk", [invert, denoise])
@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (OK, torch.tensor([0, 5, 1000]), r"timesteps must lie in 0..999; got \[0, 5, 1000\]"),
        (OK, torch.tensor([-1, 5, 9]), "timesteps must lie in 0..999"),
        (OK, torch.tensor([5, 9]), "one timestep per row"),
        (OK, torch.tensor(5), "one timestep per row"),
        (OK, torch.tensor([1.0, 2.0, 3.0]), "integer timestep"),
        (OK[:0], T[:0], "integer timestep per row"),
        (torch.ones(3), T, "floating point, \\(N, C, h, w\\)"),
        (OK.long(), T, "floating point"),
        (OK / 0, T, "must be finite"),
    ],
)
def test_impossible_tensors_are_refused(walk, x, t, message):
    with pytest.raises(ConfigError, match=message):
        walk(curved(schedule_of()), x, t, schedule_of())


def test_a_network_with_learned_variance_is_refused():
    def predict(x, time, rows):
        return torch.cat([x, x], 1)

    with pytest.raises(ConfigError, match=r"latents' shape \(3, 4, 2, 2\); got \(3, 8, 2, 2\)"):
        invert(predict, OK, T, schedule_of())


def test_one_step_to_pure_noise_is_refused():
    schedule = schedule_of("v_prediction", zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="pure noise and cannot be reached in one step"):
        invert(curved(schedule), OK, torch.tensor([0, 5, 999]), schedule, steps=1)
    assert invert(curved(schedule), OK, torch.tensor([0, 5, 998]), schedule, steps=1).latents.isfinite().all()
    flow = schedule_of("flow")
    assert invert(curved(flow), OK, torch.tensor([0, 5, 999]), flow, steps=1).latents.isfinite().all()


def test_the_grid_refuses_on_its_own():
    with pytest.raises(ConfigError, match="0..99"):
        inversion_grid(torch.tensor([100]), 10, 100)

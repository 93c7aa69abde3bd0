"""Inversion against closed forms: where it must be exact, and how its error falls with steps and iterations."""

from __future__ import annotations

import pytest
import torch

from diffalign.diffusion import NoiseSchedule, denoise, inversion_grid, invert

from .toys import KINDS, bimodal, curved, gaussian, last, normal, scales, schedule_of, speaks

MANY = torch.tensor([1, 2, 10, 100, 250, 500, 998, 999])


def error(back: torch.Tensor, x0: torch.Tensor) -> float:
    return float((back - x0).norm() / x0.norm())


def round_trip(predict, schedule, x0, t: int, steps: int, renoise: int) -> float:
    target = torch.full((len(x0),), t)
    found = invert(predict, x0, target, schedule, steps=steps, renoise=renoise, weights=last(renoise))
    return error(denoise(predict, found.latents, target, schedule, steps=steps), x0)


# --- the grid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 10, 50, 1000, 5000])
def test_grid_rises_from_clean_to_exactly_the_target(steps):
    t = torch.tensor([0, 1, 2, 10, 100, 500, 999])
    grid = inversion_grid(t, steps, 1000)
    for row, count, target in zip(grid.levels.tolist(), grid.counts.tolist(), t.tolist(), strict=True):
        walked = row[: count + 1]
        assert walked[0] == 0 and walked[-1] == target + 1 and set(row[count:]) == {target + 1}
        assert all(low < high for low, high in zip(walked, walked[1:], strict=False))
        assert count == min(max(1, -(-steps * (target + 1) // 1000)), target + 1)


def test_grid_of_the_dossier():
    grid = inversion_grid(torch.tensor([5, 250, 999]), 10, 1000)
    assert grid.counts.tolist() == [1, 3, 10]
    assert grid.levels[0, :2].tolist() == [0, 6] and grid.levels[1, :4].tolist() == [0, 84, 167, 251]
    assert grid.levels[2].tolist() == list(range(0, 1001, 100))


# --- where it is exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renoise", [0, 1, 3])
@pytest.mark.parametrize("steps", [1, 10])
def test_constant_noise_is_found_exactly_at_every_target(kind, renoise, steps):
    """Oracles 7.3.8 and 7.4.1: latents a x0 + b eps* and noise eps*, with another t in each row."""
    schedule = schedule_of(kind)
    x0, eps = normal(len(MANY), 4, 4, 4, dtype=torch.float32), normal(1, 4, 4, 4, seed=1, dtype=torch.float32)

    def predict(x, time, rows):
        if kind == "epsilon":
            return eps.expand_as(x)
        # the same belief in the network's own words; a flow model's velocity is constant too
        a, b = scales(schedule, time, x)
        return {
            "v_prediction": (eps - b * x) / a,
            "sample": (x - b * eps) / a.clamp_min(1e-6),
            "flow": eps - x0[rows],
        }[kind]

    found = invert(predict, x0, MANY, schedule, steps=steps, renoise=renoise)
    tolerance = 1e-5 if kind in ("epsilon", "flow") else 3e-4  # a v or x0 in fp32 says its noise less exactly
    assert torch.allclose(found.latents, schedule.add_noise(x0, eps.expand_as(x0), MANY), atol=tolerance)
    # divided by b of t = 1, which is 0.041 and 0.002 for flow, the rounding of the latents shows
    at_all = {"epsilon": 1e-5, "flow": 3e-4, "v_prediction": 3e-4, "sample": 3e-4}[kind]
    assert torch.allclose(found.noise, eps.expand_as(x0), atol=at_all)
    assert not found.fell_back.any() and found.latents.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_is_what_the_schedule_would_have_added(kind):
    schedule, x0 = schedule_of(kind), normal(9, 4, 4, 4, dtype=torch.float32)
    t = torch.tensor([0, *MANY.tolist()])
    found = invert(curved(schedule), x0, t, schedule, steps=7)
    assert torch.allclose(schedule.add_noise(x0, found.noise, t), found.latents, atol=1e-5)
    if kind == "flow":  # the regression target is the mean velocity of the path
        sigma = schedule.sigma(t).view(-1, 1, 1, 1)
        velocity = (found.latents - x0) / sigma
        assert torch.allclose(schedule.target(x0, found.noise, t)[1:], velocity[1:], atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("renoise", [0, 1, 2])
def test_the_noise_is_the_average_of_the_networks_predictions_along_the_path(dtype, tolerance, renoise):
    """Oracle 7.4.2: tau rho_t = sum (rho_k - rho_(k-1)) eps_k, for any network."""
    schedule, x0 = schedule_of(), normal(5, 4, 4, 4, dtype=dtype)
    t = torch.tensor([0, 60, 300, 500, 999])
    spoken = [[] for _ in t]

    def predict(x, time, rows):
        out = curved(schedule)(x, time, rows)
        for row, level, eps in zip(rows.tolist(), (time + 1).tolist(), out, strict=True):
            spoken[row].append((level, eps))
        return out

    found = invert(predict, x0, t, schedule, steps=9, renoise=renoise, guard=False)
    a, b = schedule.levels(torch.float64)
    ratio = b / a
    for row, said in enumerate(spoken):
        calls, before, total = renoise + 1, 0, torch.zeros(4, 4, 4, dtype=torch.float64)
        for i in range(0, len(said), calls):
            level = said[i][0]
            assert {told for told, _ in said[i : i + calls]} == {level}  # always the end of the step
            used = [eps.double() for _, eps in said[i : i + calls]]
            mean = sum(used) / 2 if renoise == 1 else used[-1]
            total, before = total + (ratio[level] - ratio[before]) * mean, level
        assert before == t[row] + 1
        assert float((found.noise[row].double() - total / ratio[before]).abs().max()) < tolerance * 10
        assert float((found.noise[row] * ratio[before] - total).abs().max()) < tolerance * max(1, float(ratio[before]))


def test_one_step_of_a_linear_network_has_the_known_iterates():
    """Oracle 7.4.3: from A = 0.9 to 0.5 with eps = sqrt(1/2) x the iteration contracts by exactly 1/3."""
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5], dtype=torch.float64), "epsilon")
    x0 = torch.full((1, 1, 1, 1), 0.9**-0.5, dtype=torch.float64)  # level 1 is then exactly 1

    def predict(x, time, rows):
        return torch.where(time.view(-1, 1, 1, 1) == 0, 0.0, 0.5**0.5) * x

    t = torch.tensor([1])
    iterates = [1.078689, 1.104919, 1.113662, 1.116577]
    for renoise, expected in enumerate(iterates):
        found = invert(predict, x0, t, schedule, steps=2, renoise=renoise, weights=last(renoise))
        assert float(found.latents) == pytest.approx(expected, abs=1e-6)
        if renoise:  # |y' - y| / |y|
            assert float(found.residual) == pytest.approx(expected / iterates[renoise - 1] - 1, abs=2e-6)
    averaged = invert(predict, x0, t, schedule, steps=2)
    assert float(averaged.latents) == pytest.approx(1.091804, abs=1e-6)
    fixed = invert(predict, x0, t, schedule, steps=2, renoise=40)
    assert float(fixed.latents) == pytest.approx(1.118034, abs=1e-6)
    assert float(denoise(predict, fixed.latents, t, schedule, steps=2)) == pytest.approx(0.9**-0.5, abs=1e-12)


def test_every_prediction_type_of_one_belief_gives_the_same_latents():
    x0, t = normal(len(MANY), 4, 4, 4, std=0.5), MANY
    results = []
    for kind in KINDS[:3]:
        schedule = schedule_of(kind)
        found = invert(gaussian(schedule), x0, t, schedule, steps=10, renoise=2)
        results.append((found.latents, denoise(gaussian(schedule), found.latents, t, schedule, steps=10)))
    for latents, back in results[1:]:
        assert torch.allclose(latents, results[0][0], atol=1e-9) and torch.allclose(back, results[0][1], atol=1e-9)


# --- how the error falls -------------------------------------------------------------------------------------------

TABLE = [  # oracle 7.4.4: relative error of the round trip for R = 0, 1, 2, 4, 8
    (50, 10, [2.6e-2, 4.3e-3, 7.3e-4, 2.1e-5, 1.7e-8]),
    (500, 5, [3.2e-1, 1.5e-1, 7.1e-2, 1.5e-2, 8.0e-4]),
    (500, 10, [1.5e-1, 3.7e-2, 8.6e-3, 5.1e-4, 2.2e-6]),
    (500, 50, [3.0e-2, 1.5e-3, 7.3e-5, 2.0e-7, 1.8e-12]),
    (999, 10, [2.1e-1, 6.4e-2, 1.9e-2, 1.7e-3, 1.7e-5]),
    (999, 50, [3.9e-2, 2.2e-3, 1.3e-4, 5.1e-7, 1.8e-11]),
]


@pytest.mark.parametrize(("t", "steps", "expected"), TABLE)
def test_the_error_falls_with_every_iteration_as_it_must(t, steps, expected):
    schedule, x0 = schedule_of(), normal(500, std=0.5)
    errors = [round_trip(gaussian(schedule), schedule, x0, t, steps, renoise) for renoise in (0, 1, 2, 4, 8)]
    assert all(1 / 1.5 < ours / theirs < 1.5 for ours, theirs in zip(errors, expected, strict=True))
    assert errors[1] < errors[0] and errors[4] < errors[1] / 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renoise", [0, 1])
def test_the_error_falls_with_steps(kind, renoise):
    schedule, x0 = schedule_of(kind), normal(200, std=0.5)
    errors = [round_trip(gaussian(schedule), schedule, x0, 800, steps, renoise) for steps in (5, 10, 50)]
    assert errors[0] > errors[1] > errors[2]


def test_flow_gains_from_the_first_iteration():
    """Oracle 7.4.4, flow: 5.8e-2, then about a thousandth; not monotone, as the contraction changes sign at 1/2."""
    schedule, x0 = schedule_of("flow"), normal(500)
    plain, *renoised = [round_trip(gaussian(schedule, 1.0), schedule, x0, 799, 6, r) for r in (0, 1, 2, 4)]
    assert plain == pytest.approx(5.8e-2, rel=0.1)
    assert max(renoised) < plain / 20 and renoised[2] == pytest.approx(2.0e-5, rel=0.5)


def test_variance_of_the_noise_is_not_one():
    """Oracle 7.4.5: (1 - a) / (1 + a) for N(0, 1) data and a fine grid."""
    schedule, x0 = schedule_of(), normal(4000)
    t = torch.full((4000,), 500)
    found = invert(gaussian(schedule, 1.0), x0, t, schedule, steps=50, renoise=8)
    assert float(found.noise.var()) == pytest.approx(0.327, abs=0.03)
    a = float(schedule.levels()[0][501])
    fine = invert(gaussian(schedule, 1.0), x0, t, schedule, steps=250, renoise=2)
    assert float(fine.noise.var()) == pytest.approx((1 - a) / (1 + a), rel=0.08)


def test_one_converged_step_leaves_the_inverter_no_error():
    """Oracle 7.4.6: with a single step tau becomes the network's own prediction, so nothing is left to learn."""
    schedule, x0 = schedule_of(), normal(2000, std=0.5)
    t = torch.full((2000,), 100)
    for renoise, expected in ((0, 1.7e-2), (1, 1.75e-3), (2, 1.8e-4), (8, 2e-10)):
        found = invert(gaussian(schedule), x0, t, schedule, steps=1, renoise=renoise, weights=last(renoise))
        spoken = gaussian(schedule)(found.latents, t, torch.arange(2000))
        assert found.steps.unique().tolist() == [1]
        assert float((spoken - found.noise).square().mean()) == pytest.approx(expected, rel=0.3)


# --- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_of_different_targets_is_the_same_as_each_alone(kind, dtype):
    """Oracle 7.4.7, and the rows that predict is told are the right ones."""
    schedule, t = schedule_of(kind), torch.tensor([999, 0, 250, 5, 500, 998])
    x0, own = normal(6, 4, 4, 4, dtype=dtype), normal(6, 4, 1, 1, seed=2, dtype=dtype)

    def network(conditioning):
        return lambda x, time, rows: curved(schedule)(x, time, rows) + conditioning[rows]

    together = invert(network(own), x0, t, schedule, steps=10, renoise=2)
    back = denoise(network(own), together.latents, t, schedule, steps=10)
    assert together.steps.tolist() == [10, 1, 3, 1, 6, 10]
    assert together.evaluations.tolist() == [30, 3, 9, 3, 18, 30]
    for i in range(6):
        one = slice(i, i + 1)
        alone = invert(network(own[one]), x0[one], t[one], schedule, steps=10, renoise=2)
        for name in ("latents", "noise", "residual", "fell_back", "steps"):
            assert torch.equal(getattr(together, name)[one], getattr(alone, name)), name
        assert torch.equal(back[one], denoise(network(own[one]), alone.latents, t[one], schedule, steps=10))


def test_rows_that_have_arrived_are_computed_no_more():
    """Oracle 7.4.8: the network is not even asked about them."""
    schedule, t, asked = schedule_of(), torch.tensor([999, 50, 500]), []

    def predict(x, time, rows):
        asked.append((rows.tolist(), time.tolist()))
        return curved(schedule)(x, time, rows)

    invert(predict, normal(3, 4, 2, 2), t, schedule, steps=10, renoise=0)
    assert [rows for rows, _ in asked] == [[0, 1, 2]] + [[0, 2]] * 5 + [[0]] * 4
    assert [time[0] for _, time in asked] == list(range(99, 1000, 100))
    assert asked[0][1] == [99, 50, 83] and asked[5][1] == [599, 500]


def test_a_flow_network_is_told_its_own_time():
    schedule, told = schedule_of("flow"), []

    def predict(x, time, rows):
        told.append(time)
        return torch.zeros_like(x)

    invert(predict, normal(1, 4, 2, 2), torch.tensor([999]), schedule, steps=4, renoise=0)
    assert torch.equal(torch.cat(told), torch.tensor([250.0, 500.0, 750.0, 1000.0]))
    denoise(predict, normal(1, 4, 2, 2), torch.tensor([999]), schedule, steps=2)
    assert torch.equal(torch.cat(told[4:]), torch.tensor([1000.0, 500.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_first_and_last_timestep(kind):
    """Oracle 7.4.8: t = 0 is one step to a x0 + b eps; t = T - 1 is finite."""
    schedule, x0 = schedule_of(kind), normal(2, 4, 4, 4, dtype=torch.float32)
    t = torch.tensor([0, 999])
    found = invert(curved(schedule), x0, t, schedule, renoise=0)
    assert found.steps.tolist() == [1, 10] and found.latents.isfinite().all() and found.noise.isfinite().all()
    spoken = curved(schedule)(x0[:1], schedule.time(t[:1]), t)
    a, b = scales(schedule, schedule.time(t[:1]), x0)
    noise = {"epsilon": spoken, "v_prediction": a * spoken + b * x0[:1], "sample": (x0[:1] - a * spoken) / b,
             "flow": spoken + x0[:1]}[kind]  # fmt: skip
    assert torch.allclose(found.latents[:1], a * x0[:1] + b * noise, atol=1e-6)


# --- what surrounds it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_pure_noise_at_zero_terminal_snr(kind):
    """The last step asks at its start, once, and its answer is the noise seen there (dossier 4.5)."""
    schedule = schedule_of(kind, zero_terminal_snr=True)
    x0, t, asked = normal(3, 4, 4, 4, std=0.5), torch.tensor([999, 899, 0]), []

    def predict(x, time, rows):
        asked.append((rows.tolist(), time.tolist()))
        return gaussian(schedule)(x, time, rows)

    found = invert(predict, x0, t, schedule, steps=10, renoise=1)
    assert asked[-1] == ([0], [899]) and 999 not in [time for _, times in asked for time in times]
    assert found.evaluations.tolist() == [19, 18, 2] and found.latents.isfinite().all()
    same = invert(predict, x0[:1], torch.tensor([899]), schedule, steps=10, renoise=1)
    a, b = scales(schedule, torch.tensor([899]), x0)
    clean = a * 0.25 * same.latents / (a * a * 0.25 + b * b)
    assert torch.allclose(found.latents[:1], (same.latents - a * clean) / b)
    assert torch.equal(found.noise[0], found.latents[0])
    assert denoise(predict, found.latents, t, schedule, steps=10).isfinite().all()


def test_nothing_has_a_gradient_and_randomness_is_untouched():
    """Oracles 7.3.7 and 7.4.10."""
    schedule, t = schedule_of(), torch.tensor([300, 700])
    weight = torch.nn.Parameter(torch.ones(()))
    x0, enabled = normal(2, 4, 4, 4).requires_grad_(), []

    def predict(x, time, rows):
        enabled.append(torch.is_grad_enabled())
        return weight * curved(schedule)(x, time, rows)

    state = torch.get_rng_state()
    first, second = (invert(predict, x0, t, schedule, renoise=2) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state()) and not any(enabled) and torch.is_grad_enabled()
    for name in ("latents", "noise", "residual"):
        assert torch.equal(getattr(first, name), getattr(second, name)) and not getattr(first, name).requires_grad
    assert not denoise(predict, first.latents, t, schedule).requires_grad
    # the loss of a policy on inverted latents has the gradient that it has on plain tensors
    (gradient,) = torch.autograd.grad((weight * first.latents - first.noise).square().mean(), weight)
    constant = first.latents.clone(), first.noise.clone()
    (expected,) = torch.autograd.grad((weight * constant[0] - constant[1]).square().mean(), weight)
    assert torch.equal(gradient, expected)


def test_inputs_stay_as_they_are_and_half_precision_is_computed_in_fp32():
    schedule, x0 = schedule_of(), normal(2, 4, 4, 4, dtype=torch.float32)
    kept, t = x0.clone(), torch.tensor([300, 700], dtype=torch.int32)
    full = invert(curved(schedule), x0, t, schedule)
    assert torch.equal(x0, kept)
    half = invert(lambda x, time, rows: curved(schedule)(x, time, rows).bfloat16(), x0.bfloat16(), t, schedule)
    assert half.latents.dtype == half.noise.dtype == torch.float32
    assert torch.allclose(half.latents, full.latents, atol=0.1)
    assert not half.fell_back.any()
    back = denoise(curved(schedule), half.latents.double(), t, schedule)
    assert back.dtype == torch.float64 and denoise(curved(schedule), half.latents, t, schedule).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_between_two_modes_it_neither_converges_nor_diverges(kind):
    """Oracle 7.4.11: more iterations stop helping there, but nothing grows; the guard saves what it can."""
    schedule, side = schedule_of(kind), normal(500, seed=1).sign()
    x0, t = side + normal(500, std=0.2), torch.full((500,), 600)
    found, wild = (
        invert(bimodal(schedule), x0, t, schedule, steps=10, renoise=32, guard=guard) for guard in (True, False)
    )
    assert found.latents.isfinite().all() and found.residual.isfinite().all() and found.latents.abs().max() < 10
    assert 0 < found.fell_back.sum() < 50 and wild.residual.max() > 0.1
    ours, theirs = (error(denoise(bimodal(schedule), i.latents, t, schedule, steps=10), x0) for i in (found, wild))
    assert ours < theirs < 0.12


def test_weights_mix_the_networks_outputs():
    schedule, x0, t = schedule_of(), normal(4, 4, 2, 2), torch.tensor([40] * 4)  # one step
    one, two = (invert(curved(schedule), x0, t, schedule, renoise=r, weights=last(r)).latents for r in (0, 1))
    mixed = invert(curved(schedule), x0, t, schedule, renoise=1, weights=[0.25, 0.75]).latents
    assert torch.allclose(mixed, 0.25 * one + 0.75 * two, atol=1e-12)
    assert torch.allclose(invert(curved(schedule), x0, t, schedule).latents, (one + two) / 2, atol=1e-12)
    assert not torch.allclose(one, two, atol=1e-3)
    third = invert(speaks(schedule, lambda x, a, b: x.tanh()), x0, t, schedule, renoise=3)
    also = invert(speaks(schedule, lambda x, a, b: x.tanh()), x0, t, schedule, renoise=3, weights=last(3))
    assert torch.equal(third.latents, also.latents)

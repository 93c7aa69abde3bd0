"""Truncated walks and re-noising: the numbers, the laws, and the fixed point."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffalign.diffusion import FlowSchedule, NoiseSchedule
from diffalign.diffusion.truncated import descent, renoise, truncated_walk
from diffalign.errors import ConfigError
from tests.tiny import NOISE

SCHEDULE = NoiseSchedule.from_scheduler({**NOISE, "prediction_type": "epsilon"})
FLOW = FlowSchedule(1000)


def gaussian_teacher(schedule, m: float):
    """The exact network for data N(m, 1): E[x0 | x_t] = m + a (x - a m) / (a^2 + b^2), told the schedule's time."""
    signal, spread = schedule.levels(torch.float64)

    def predict(x, time, rows):
        level = (time + 1 if isinstance(schedule, NoiseSchedule) else time).long()
        a, b = (table[level].view(-1, *[1] * (x.ndim - 1)) for table in (signal, spread))
        clean = m + a * (x.double() - a * m) / (a * a + b * b)
        noise = (x.double() - a * clean) / b
        return (noise - clean if isinstance(schedule, FlowSchedule) else noise).float()

    return predict


def test_renoising_numbers():
    """Scale of x_t and standard deviation of the added noise for SD's schedule."""
    t, s = torch.tensor([0, 39, 199, 799]), torch.tensor([1, 40, 600, 999])
    ones, zeros = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    scale = renoise(ones, zeros, t, s, SCHEDULE).flatten()
    added = renoise(zeros, ones, t, s, SCHEDULE).flatten()
    torch.testing.assert_close(scale, torch.tensor([0.999573, 0.999476, 0.461400, 0.353961]), rtol=0, atol=1e-6)
    torch.testing.assert_close(added, torch.tensor([0.029235, 0.032374, 0.887192, 0.935260]), rtol=0, atol=1e-6)
    _, spread = SCHEDULE.levels(torch.float64)
    expected = spread[s + 1].square().float()
    torch.testing.assert_close(scale**2 * spread[t + 1].square().float() + added**2, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=["epsilon", "flow"])
def test_renoised_latents_have_the_law_of_the_forward_process(schedule):
    torch.manual_seed(0)
    count = 200_000
    t, s = torch.full((count,), 300), torch.full((count,), 700)
    x0 = torch.full((count, 1), 1.5)
    x_t = schedule.add_noise(x0, torch.randn(count, 1), t)
    x_s = renoise(x_t, torch.randn(count, 1), t, s, schedule)
    signal, spread = schedule.levels()
    assert abs(x_s.mean() - 1.5 * signal[701]) < 0.01
    assert abs(x_s.var() - spread[701] ** 2) < 0.01
    assert torch.equal(renoise(x_t, torch.randn(count, 1), t, t, schedule), x_t)
    with pytest.raises(ConfigError, match="only be added"):
        renoise(x_t, x_t, s, t, schedule)


def test_no_pair_of_timesteps_gives_nan():
    t, s = torch.triu_indices(1000, 1000)
    for schedule in (SCHEDULE, FLOW):
        keep = t < 999
        assert renoise(torch.ones(int(keep.sum()), 1), torch.ones(1), t[keep], s[keep], schedule).isfinite().all()


def test_every_row_walks_evenly_to_its_own_stop():
    stop = torch.tensor([0, 3, 500, 998, 999])
    times = descent(stop, 5, 1000)
    assert times.shape == (5, 6) and (times[:, 0] == 999).all() and torch.equal(times[:, -1], stop)
    assert times[0].tolist() == [999, 799, 599, 400, 200, 0]
    assert (times.diff(dim=1) <= 0).all() and times[3].unique().tolist() == [998, 999]
    with pytest.raises(ConfigError, match="lie in"):
        descent(torch.tensor([1000]), 5, 1000)


def test_the_walk_is_that_of_diffusers_ddim():
    """Five steps of a 1000/200 grid, the same numbers as DDIMScheduler."""
    torch.manual_seed(1)
    mixer = torch.randn(4, 4) / 2
    calls = []

    def predict(x, time, rows):
        calls.append((time.tolist(), rows.tolist()))
        return torch.einsum("cd,ndhw->nchw", mixer, x) * 0.5

    x = torch.randn(2, 4, 3, 3)
    times = torch.tensor([[999, 799, 599, 399], [999, 799, 799, 799]])
    walked = truncated_walk(predict, x, times, SCHEDULE)
    scheduler = DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    expected = x.clone()
    for t in (999, 799, 599):
        stepped = scheduler.step(
            predict(expected, torch.tensor([t] * 2), torch.tensor([0, 1])), t, expected
        ).prev_sample
        expected = stepped if t == 999 else torch.stack([stepped[0], expected[1]])
    torch.testing.assert_close(walked.latents, expected, rtol=1e-4, atol=1e-5)
    assert calls[:4] == [([999, 999], [0, 1]), ([799], [0]), ([599], [0]), ([399, 799], [0, 1])]
    clean = SCHEDULE.to_x0(predict(expected, torch.zeros(2), torch.arange(2)), expected, torch.tensor([399, 799]))
    torch.testing.assert_close(walked.clean, clean, rtol=1e-4, atol=1e-4)


def test_the_walk_of_a_flow_model_is_euler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5])
    x = expected = torch.randn(1, 2, 3, 3)

    def predict(x, time, rows):
        return 0.3 * x + 1

    for t in scheduler.timesteps[:2]:
        expected = scheduler.step(predict(expected, None, None), t, expected).prev_sample
    walked = truncated_walk(predict, x, torch.tensor([[999, 749, 499]]), FLOW)
    torch.testing.assert_close(walked.latents, expected, rtol=1e-4, atol=1e-5)


def test_the_released_grid_of_five_steps_from_any_start():
    """25 steps of 40: from index k at most five steps, the last of which lands on timestep 0."""
    k = torch.arange(25)
    grid = torch.cat([torch.zeros(1, dtype=torch.int64), 40 * (k + 1) - 1])  # entry k + 1 is tau_k, entry 0 is done
    places = (k[:, None] + 1 - torch.arange(6)).clamp_min(0)
    times = grid[places]
    seen = torch.zeros(25, dtype=torch.int64)

    def predict(x, time, rows):
        seen.index_add_(0, rows, torch.ones_like(rows))
        return torch.zeros_like(x)

    walk = truncated_walk(predict, torch.randn(25, 1, 2, 2), times, SCHEDULE)
    stop = times[:, -1]
    assert walk.latents.isfinite().all() and walk.clean.isfinite().all()
    assert torch.equal(seen - 1, torch.minimum(k + 1, torch.tensor(5)))  # one more call states the target
    assert (stop[:5] == 0).all() and torch.equal(stop[5:], 40 * (k[5:] + 1) - 1 - 200) and stop.max() == 799


@pytest.mark.parametrize("schedule", [SCHEDULE, FLOW], ids=["epsilon", "flow"])
def test_a_perfect_unguided_teacher_is_a_fixed_point(schedule):
    """Best regression of its target on x_s is the teacher itself, so the student's expected gradient there is 0."""
    torch.manual_seed(2)
    m, count = 0.7, 400_000
    teacher = gaussian_teacher(schedule, m)
    signal, spread = schedule.levels(torch.float64)
    for low, high in ((100, 400), (300, 800), (600, 950)):
        t, s = torch.full((count,), low), torch.full((count,), high)
        x0 = m + torch.randn(count, 1)
        x_t = schedule.add_noise(x0, torch.randn(count, 1), t)  # the reference's own law
        target = truncated_walk(teacher, x_t, t[:, None], schedule).clean
        x_s = renoise(x_t, torch.randn(count, 1), t, s, schedule)
        covariance = torch.cov(torch.stack([x_s, target]).squeeze(-1))
        slope = covariance[0, 1] / covariance[0, 0]
        a, b = signal[high + 1], spread[high + 1]
        right = a / (a * a + b * b)
        assert abs(slope - right) < 0.01
        assert abs(target.mean() - slope * x_s.mean() - (m - right * a * m)) < 0.01
        at_teacher = truncated_walk(teacher, x_s, s[:, None], schedule).clean
        residual = (target - at_teacher).flatten()
        for feature in (torch.ones(count), x_s.flatten()):  # gradient of the squared loss with respect to both weights
            noise = (residual * feature).std() / count**0.5
            assert abs((residual * feature).mean()) < 4 * noise
        # what does move the student: a target guided away from the conditional mean
        guided = 2 * m - target
        assert abs(((guided - at_teacher).flatten() * x_s.flatten()).mean()) > 0.05


def test_a_coarse_walk_is_what_moves_an_unguided_student():
    """The walk's own law: few steps leave too little variance, and a teacher taught by them is no fixed point."""
    torch.manual_seed(3)
    count, stop = 100_000, 100
    start = torch.randn(count, 1)
    spread = []
    for steps in (1, 5, 50):
        times = descent(torch.full((count,), stop), steps, 1000)
        spread.append(truncated_walk(gaussian_teacher(SCHEDULE, 0.0), start, times, SCHEDULE).latents.var().item())
    assert spread[0] < spread[1] < spread[2] < 1.01 and spread[0] < 0.6 and spread[2] > 0.95

"""Alarms on made-up curves: each fires on its failure and on nothing else."""

from __future__ import annotations

import json

import pytest

from diffalign.trainers.grpo.alarms import GRPO_CHECKS
from diffalign.trainers.health import HealthMonitor


def fired(rows):
    monitor = HealthMonitor(window=20, checks=GRPO_CHECKS)
    alarms = [alarm for step, row in enumerate(rows, 1) for alarm in monitor.update(step, row)]
    return [alarm.name for alarm in alarms], alarms


def run(steps=60, *, every=10, trained=0.0, unseen=0.0, error=0.05, silent=0.0, diversity=lambda step: 0.3):
    """Curves of a run whose hold-out scores have changed by ``trained`` and ``unseen`` at the end, linearly."""
    for step in range(1, steps + 1):
        row = {"loss": 0.0, "grad_norm": 1.0, "group/silent": silent, "group/diversity": diversity(step)}
        if step % every == 0:
            for name, change in (("training-pickscore", trained), ("clip", unseen)):
                row[f"holdout/{name}"] = 1.0 + change * step / steps
                row |= {f"holdout/{name}_change": change * step / steps, f"holdout/{name}_error": error}
        yield row


def test_a_hacked_run_is_told_and_says_which_score_fell():
    names, alarms = fired(run(trained=0.8, unseen=-0.5))
    assert names == ["reward_hacking"]
    assert "clip" in alarms[0].message
    assert "pickscore" not in alarms[0].message


@pytest.mark.parametrize(("trained", "unseen"), [(0.8, 0.5), (0.8, 0.0), (0.8, -0.05), (-0.5, -0.5), (0.0, -0.5)])
def test_other_runs_are_not_called_hacked(trained, unseen):
    assert fired(run(trained=trained, unseen=unseen))[0] == []


def test_one_bad_measurement_is_no_alarm():
    rows = list(run(trained=0.8, unseen=0.1))
    rows[-1]["holdout/clip_change"] = -0.5
    assert fired(rows)[0] == []


def test_a_judge_without_scores_can_show_a_hacked_run_too():
    rows = list(run(trained=0.4, unseen=-0.5))
    for row in rows:
        row.pop("holdout/training-pickscore", None)
    assert fired(rows)[0] == ["reward_hacking"]


def test_vanishing_spread():
    assert fired(run(silent=0.6))[0] == ["no_spread"]
    assert fired(run(silent=0.3))[0] == []


@pytest.mark.parametrize("name", ["reward/clip/score_spread", "reward/judge/spread_of_reward"])
def test_a_spread_that_fades_without_exact_ties(name):
    """Raw scores where there are some: win rates of scores that all but agree are as far apart as ever."""

    def rows(left):
        for step, row in enumerate(run(), 1):
            yield row | {"reward/clip/spread_of_reward": 0.3, name: 0.2 * (1.0 if step <= 25 else left)}

    names, alarms = fired(rows(1e-4))
    assert names == ["no_spread"] and f"{name.split('/')[1]} 0.05" in alarms[0].message
    assert fired(rows(1.0))[0] == []
    assert fired(rows(0.3))[0] == []


def slow_fall():
    return run(600, diversity=lambda step: 0.3 * (1 - 0.8 * step / 600))


def test_a_slow_collapse_is_seen_against_the_start():
    names, alarms = fired(slow_fall())
    assert names == ["collapse"]
    assert 380 < alarms[0].step < 420  # where half of the diversity is gone


def test_a_resumed_run_remembers_its_start():
    monitor = HealthMonitor(window=20, checks=GRPO_CHECKS)
    rows = list(slow_fall())
    for step, row in enumerate(rows[:200], 1):
        assert monitor.update(step, row) == []
    again = HealthMonitor(window=20, checks=GRPO_CHECKS)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    later = [alarm for step, row in enumerate(rows[200:], 201) for alarm in again.update(step, row)]
    assert [(alarm.name, alarm.step) for alarm in later] == [(a.name, a.step) for a in fired(rows)[1]]
    assert later[0].name == "collapse"


def test_a_single_picture_proves_nothing():
    """One picture has no standard error, so no change of it is significant."""
    rows = list(run(trained=0.8, unseen=-0.5))
    for row in rows:
        for name in ("training-pickscore", "clip"):
            row.pop(f"holdout/{name}_error", None)
    assert fired(rows)[0] == []


def test_collapse():
    assert fired(run(diversity=lambda step: 0.3 if step < 25 else 0.1))[0] == ["collapse"]
    assert fired(run(diversity=lambda step: 0.3 - 0.001 * step))[0] == []


@pytest.mark.parametrize("updates", [1, 2, 5])
def test_numbers_of_a_rollout_are_seen_however_many_updates_it_has(updates):
    """Only the first update of a rollout carries them."""

    def rows(**made_up):
        for step, row in enumerate(run(**made_up)):
            yield row if step % updates == 0 else {n: v for n, v in row.items() if not n.startswith("group/")}

    assert fired(rows(silent=0.6))[0] == ["no_spread"]
    assert fired(rows(diversity=lambda step: 0.3 if step < 25 else 0.1))[0] == ["collapse"]
    assert fired(rows())[0] == []


def test_hold_outs_that_are_rarely_scored_raise_their_alarm_too():
    monitor = HealthMonitor(window=20, checks=GRPO_CHECKS, keep=2 * 150)
    rows = run(steps=450, every=150, trained=0.8, unseen=-0.5)
    alarms = [alarm.name for step, row in enumerate(rows, 1) for alarm in monitor.update(step, row)]
    assert alarms == ["reward_hacking"]
    again = HealthMonitor(window=20, checks=GRPO_CHECKS, keep=2 * 150)
    again.load_state_dict(monitor.state_dict())
    assert again.active == ["reward_hacking"] and len(again.state_dict()["rows"]) == 300

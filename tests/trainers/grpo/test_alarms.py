"""Alarms on made-up curves: each fires on its failure and on nothing else."""

from __future__ import annotations

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

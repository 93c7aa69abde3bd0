"""Each alarm sounds on a made-up curve of its failure and is silent on a healthy one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable

import pytest

from diffalign.trainers.health import CHECKS, Alarm, HealthMonitor

STEPS = 400
LN2 = math.log(2)


def healthy(seed: int = 0, steps: int = STEPS, level: float = 0.12) -> list[dict[str, float]]:
    """A run that learns: winners a little better, losers worse, everything as noisy as batches of 16 are."""
    noise = random.Random(seed)
    curve = []
    for i in range(steps):
        progress = i / steps
        winner_change = level * (-0.005 * progress + noise.gauss(0, 0.004) * min(1, 5 * progress))
        loser_change = level * (0.02 * progress + noise.gauss(0, 0.006) * min(1, 5 * progress))
        margin = 2.0 * progress + noise.gauss(0, 0.5) * min(1, 5 * progress)
        reference = level * math.exp(noise.gauss(0, 0.3))  # timesteps differ from step to step
        curve.append(
            {
                "loss": LN2 * (1 - 0.3 * progress) + noise.gauss(0, 0.1) * min(1, 5 * progress),
                "rewards/margins": margin,
                "rewards/accuracies": min(1.0, max(0.0, 0.5 + 0.25 * min(1, 3 * progress) + noise.gauss(0, 0.12))),
                "gradient_factor": 0.5 - 0.2 * progress,
                "error/winner_change": winner_change,
                "error/loser_change": loser_change,
                "error/winner": reference + winner_change,
                "error/loser": 1.1 * reference + loser_change,
                "grad_norm": math.exp(noise.gauss(0, 0.6)),
                "learning_rate": 1e-5,
            }
        )
    return curve


def fired(curve: list[dict[str, float]], monitor: HealthMonitor | None = None) -> list[Alarm]:
    monitor = monitor or HealthMonitor()
    return [alarm for step, metrics in enumerate(curve, start=1) for alarm in monitor.update(step, metrics)]


def names(curve: list[dict[str, float]]) -> list[str]:
    return [alarm.name for alarm in fired(curve)]


def _shift(curve: list[dict[str, float]], side: str, amount: Callable[[float], float], level: float = 0.12) -> None:
    """Add ``amount(progress)`` times the reference's error to one side's error."""
    for i, row in enumerate(curve):
        extra = level * amount(i / len(curve))
        row[f"error/{side}_change"] += extra
        row[f"error/{side}"] += extra


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_left_in_peace(seed: int):
    assert names(healthy(seed)) == []


@pytest.mark.parametrize("level", [0.004, 0.12, 30.0])
def test_the_scale_of_the_errors_does_not_matter(level: float):
    assert names(healthy(level=level)) == []
    curve = healthy(level=level)
    _shift(curve, "winner", lambda p: 0.3 * p, level)
    assert "winner_error_rising" in names(curve)


def test_winner_error_rising():
    curve = healthy()
    _shift(curve, "winner", lambda p: 0.2 * p)
    alarms = fired(curve)
    assert [alarm.name for alarm in alarms] == ["winner_error_rising"]
    assert 80 < alarms[0].step < 250  # the limit of 5 % is crossed at step 100 and seen within two windows
    for part in ("preferred images", "likelihood displacement", "lower learning_rate"):
        assert part in alarms[0].message


@pytest.mark.parametrize("amount", [lambda p: 0.02 * p, lambda p: 0.1 - 0.1 * p])
def test_a_small_or_falling_winner_error_is_no_alarm(amount: Callable[[float], float]):
    curve = healthy()
    _shift(curve, "winner", amount)
    assert names(curve) == []


def test_loser_runaway():
    curve = healthy()
    _shift(curve, "loser", lambda p: p)
    alarms = fired(curve)
    assert [alarm.name for alarm in alarms] == ["loser_runaway"]
    assert "what to avoid" in alarms[0].message


def test_a_loser_that_rises_while_the_winner_falls_as_well_is_no_alarm():
    curve = healthy()
    _shift(curve, "loser", lambda p: 0.5 * p)
    _shift(curve, "winner", lambda p: -0.3 * p)
    assert names(curve) == []


def test_saturation():
    curve = healthy()
    for row in curve[100:]:
        row["gradient_factor"] = 0.01
    alarms = fired(curve)
    assert [(alarm.name, alarm.step) for alarm in alarms] == [("saturation", 138)]  # 3/4 of the window of 50
    assert "0.5" in alarms[0].message and "memorised" in alarms[0].message


def test_a_few_saturated_steps_are_no_alarm():
    curve = healthy()
    for row in curve[::2]:
        row["gradient_factor"] = 0.01
    assert names(curve) == []


def test_nothing_learnt():
    curve = healthy()
    noise = random.Random(5)
    for row in curve:
        row["rewards/accuracies"], row["rewards/margins"] = 0.5 + noise.gauss(0, 0.12), noise.gauss(0, 0.05)
    alarms = fired(curve)
    assert [alarm.name for alarm in alarms] == ["nothing_learnt"]
    assert alarms[0].step >= 200, "patience: four windows"
    assert "coin" in alarms[0].message


def test_a_slow_learner_is_not_called_one_that_learns_nothing():
    curve = healthy()
    noise = random.Random(5)
    for row in curve:
        row["rewards/accuracies"], row["rewards/margins"] = 0.54 + noise.gauss(0, 0.12), 0.03 + noise.gauss(0, 0.1)
    assert names(curve) == []


def test_loss_above_start():
    curve = healthy()
    noise = random.Random(5)
    for row in curve[50:]:
        row["loss"] = 1.3 + noise.gauss(0, 0.3)
    alarms = fired(curve)
    assert [alarm.name for alarm in alarms] == ["loss_above_start"]
    assert "0.693" in alarms[0].message


def test_a_noisy_loss_around_its_start_is_no_alarm():
    curve = healthy()
    noise = random.Random(5)
    for row in curve[1:]:
        row["loss"] = LN2 + noise.gauss(0, 0.5)
    assert names(curve) == []


def test_gradient_spike():
    curve = healthy()
    curve[200]["grad_norm"] = 100.0
    alarms = fired(curve)
    assert [(alarm.name, alarm.step) for alarm in alarms] == [("gradient_spike", 201)]
    assert "times its usual size" in alarms[0].message


def test_ordinary_outliers_of_the_gradient_are_no_alarm():
    curve = healthy()
    for row in curve[30::40]:
        row["grad_norm"] = 6.0
    assert names(curve) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "error/winner", "rewards/margins"])
def test_not_finite_at_once(name: str, value: float):
    curve = healthy(steps=10)
    curve[4][name] = value
    alarms = fired(curve)
    assert [(alarm.name, alarm.step) for alarm in alarms] == [("not_finite", 5)]
    assert name in alarms[0].message and "last checkpoint" in alarms[0].message


def test_a_few_overflows_of_fp16_are_no_alarm_but_ten_in_a_row_are():
    curve = healthy(steps=60)
    for row in curve[:6]:
        row["grad_norm"] = math.inf
    assert names(curve) == []
    for row in curve[:10]:
        row["grad_norm"] = math.inf
    assert [(alarm.name, alarm.step) for alarm in fired(curve)] == [("not_finite", 10)]


def test_an_alarm_sounds_once_until_it_clears():
    curve = healthy(steps=600)
    for part in (slice(100, 200), slice(400, 500)):
        for row in curve[part]:
            row["gradient_factor"] = 0.0
    alarms = fired(curve)
    assert [alarm.name for alarm in alarms] == ["saturation", "saturation"]
    monitor = HealthMonitor()
    fired(curve[:160], monitor)
    assert monitor.active == ["saturation"]
    fired(curve[160:350], monitor)
    assert monitor.active == [] and [alarm["name"] for alarm in monitor.raised] == ["saturation"]


def test_a_resumed_monitor_says_what_one_that_never_stopped_says():
    curve = healthy()
    _shift(curve, "winner", lambda p: 0.2 * p)
    for row in curve[300:]:
        row["gradient_factor"] = 0.01
    whole = HealthMonitor()
    expected = fired(curve, whole)
    for cut in (1, 77, 137, 320):
        first = HealthMonitor()
        before = fired(curve[:cut], first)
        second = HealthMonitor()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [a for i, row in enumerate(curve[cut:], start=cut + 1) for a in second.update(i, row)]
        assert before + after == expected
        assert second.state_dict() == whole.state_dict()


def test_methods_without_a_reference_are_watched_for_what_they_have():
    curve = [{k: v for k, v in row.items() if k in ("loss", "error/winner", "grad_norm")} for row in healthy()]
    assert names(curve) == []
    curve[50]["loss"] = math.nan
    assert names(curve) == ["not_finite"]


def test_every_alarm_is_tested_here():
    tested = {
        name for name in CHECKS if f"test_{name}" in globals() or any(g.startswith(f"test_{name}") for g in globals())
    }
    assert tested == set(CHECKS)


def test_a_window_too_short_to_say_anything_is_refused():
    with pytest.raises(ValueError, match="20 steps"):
        HealthMonitor(window=5)

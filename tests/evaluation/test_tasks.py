"""Means of task means: oracles by hand, missing answers, intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffalign.evaluation import tasks as tasks_module
from diffalign.evaluation.tasks import difference, summarise

GENEVAL = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}


def test_geneval_overall_is_the_mean_of_six_task_means_whatever_their_sizes():
    means = dict(zip(GENEVAL, (1.0, 1.0, 0.5, 0.5, 0.0, 0.0), strict=True))
    tasks = [task for task, count in GENEVAL.items() for _ in range(count)]
    right = [float(i < means[task] * GENEVAL[task]) for task in GENEVAL for i in range(GENEVAL[task])]
    result = summarise([[task] for task in tasks], [[value] for value in right], [str(i) for i in range(len(tasks))])
    assert result.overall.mean == result.lower == 0.5
    assert np.mean(right) == pytest.approx(0.4810, abs=5e-5)
    assert {name: d.value for name, d in result.dimensions.items()} == means
    assert result.overall.low < 0.5 < result.overall.high and result.parts == {}


def test_unigenbench_points_count_by_dimension_and_part():
    names = ["Attribute - Color", "Attribute - Shape", "Style"]
    result = summarise([names, names[:1]], [[1, 0, 1], [1]], ["a", "b"])
    assert result.dimensions["Attribute"].value == pytest.approx(2 / 3) and result.dimensions["Style"].value == 1
    assert result.parts["Attribute - Color"].value == 1 and result.parts["Attribute - Shape"].value == 0
    assert result.overall.mean == pytest.approx((2 / 3 + 1) / 2)
    assert "Style" not in result.parts
    assert result.any_right == 0.5


def test_missing_answers_leave_the_value_are_counted_and_bound_it_from_below():
    dimensions = [["a"], ["a"], ["b"], ["b"]]
    result = summarise(dimensions, [[1], None, [1], [1, 0]], ["p", "q", "r", "s"])  # the last has the wrong length
    assert result.overall.mean == 1 and result.lower == 0.5 and result.missing == 0.5
    assert (result.dimensions["a"].n, result.dimensions["a"].missing) == (1, 1)
    assert summarise(dimensions, [[1], [1], [1], None], ["p", "q", "r", "s"]).missing == 0.25


def test_scores_below_zero_have_no_lower_bound():
    result = summarise([["a"], ["a"], ["b"]], [[-1.0], None, [1.0]], ["p", "q", "r"])
    assert math.isnan(result.lower) and math.isnan(result.dimensions["a"].lower) and result.dimensions["b"].lower == 1
    assert result.to_json()["overall"]["lower"] is None


def test_the_overall_value_of_few_prompts_has_no_interval():
    assert math.isnan(summarise([["a"], ["b"]] * 2, [[1], [0], [0], [1]], list("pqrs")).overall.low)
    assert not math.isnan(summarise([["a"], ["b"]] * 3, [[1], [0], [0], [1], [1], [1]], list("pqrstu")).overall.low)


def test_a_dimension_without_any_answer_is_reported_as_missing_not_dropped():
    result = summarise([["a"], ["b"]], [[1], [math.nan]], ["p", "q"])
    entry = result.to_json()
    assert entry["dimensions"]["b"] == {"value": None, "lower": 0.0, "n": 0, "missing": 1}
    assert entry["overall"]["value"] is None and entry["overall"]["lower"] == 0.5
    assert entry["dimensions"]["a"]["value"] == 1


def test_the_difference_is_paired():
    rng = np.random.default_rng(0)
    dimensions = [["a"], ["b"]] * 40
    base = [[value] for value in rng.random(80)]
    aligned = [[value[0] + 0.1] for value in base]
    change = difference(dimensions, base, aligned, [str(i) for i in range(80)])
    assert (change.mean, change.low, change.high) == pytest.approx((0.1, 0.1, 0.1))
    aligned[0] = None
    assert difference(dimensions, base, aligned, [str(i) for i in range(80)]).mean == pytest.approx(0.1)


def test_95_per_cent_intervals_of_the_overall_value_cover_the_truth(monkeypatch):
    monkeypatch.setattr(tasks_module, "_RESAMPLES", 400)  # time
    rng = np.random.default_rng(1)
    tasks, chances = ["a"] * 15 + ["b"] * 45, np.repeat([0.3, 0.7], [15, 45])
    hits, studies = 0, 500
    for _ in range(studies):
        results = [[float(value)] for value in rng.random(60) < chances]
        overall = summarise([[task] for task in tasks], results, [str(i) for i in range(60)]).overall
        hits += overall.low <= 0.5 <= overall.high
    assert 0.93 <= hits / studies <= 0.97

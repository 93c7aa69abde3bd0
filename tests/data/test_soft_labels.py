"""Soft labels from scores, and the range they are measured in."""

from __future__ import annotations

import json
import math

import pytest

from diffalign.data import load_preferences, select_pairs, soften, store_score_ranges, write_preferences
from diffalign.errors import ConfigError, DataError
from tests.trainers.conftest import preference_rows


def rows(scores):
    made = preference_rows(len(scores))
    for row, values in zip(made, scores, strict=True):
        row["scores"] = {"clip": list(values)}
    return made


SCORES = [(0.3, 0.1), (0.2, 0.2), (0.1, 0.2), (None, 0.5)]


def test_probabilities_are_those_of_the_formula() -> None:
    dataset = load_preferences(rows(SCORES))
    examples, _ = select_pairs(dataset)
    soft, counts = soften(examples, dataset, "clip", (0.0, 0.4), contradiction="follow_scores")
    assert counts == {"score_missing": 1, "contradictions": 1}
    expected = [1 / (1 + math.exp(-d / 0.4)) for d in (0.2, 0.0, -0.1)]
    assert [example.probability for example in soft] == pytest.approx(expected)
    assert soft[1].probability == 0.5


@pytest.mark.parametrize(("policy", "probabilities"), [("undecided", [0.5, 0.5]), ("drop", [0.5])])
def test_contradictions_follow_the_named_policy(policy, probabilities) -> None:
    dataset = load_preferences(rows(SCORES))
    soft, counts = soften(select_pairs(dataset)[0], dataset, "clip", (0.0, 0.4), contradiction=policy)
    assert [example.probability for example in soft[1:]] == probabilities
    assert counts["contradictions"] == 1


def test_a_tie_that_was_kept_is_decided_by_its_scores_and_contradicts_nothing() -> None:
    table = rows(SCORES[:3])
    table[2]["preference"] = [0.5, 0.5]  # scores say that the second is better
    dataset = load_preferences(table)
    for policy in ("undecided", "follow_scores", "drop"):
        soft, counts = soften(select_pairs(dataset, ties="soft")[0], dataset, "clip", (0.0, 0.4), contradiction=policy)
        assert counts["contradictions"] == 0
        assert soft[2].probability == pytest.approx(1 / (1 + math.exp(0.1 / 0.4)))


def test_only_the_width_and_the_difference_count() -> None:
    dataset = load_preferences(rows(SCORES))
    examples, _ = select_pairs(dataset)
    plain = soften(examples, dataset, "clip", (0.0, 0.4))[0]
    shifted = soften(examples, dataset, "clip", (5.0, 5.4))[0]
    assert [e.probability for e in shifted] == pytest.approx([e.probability for e in plain])


def test_the_stored_range_outlives_the_rows_it_came_from(tmp_path) -> None:
    write_preferences(rows(SCORES), tmp_path)
    assert load_preferences(str(tmp_path)).score_range("clip") == (0.1, 0.5)
    assert load_preferences(str(tmp_path)).select([0, 1]).score_range("clip") == (0.1, 0.3)
    assert store_score_ranges(tmp_path) == {"clip": (0.1, 0.5)}
    assert load_preferences(str(tmp_path)).select([0, 1]).score_range("clip") == (0.1, 0.5)
    (tmp_path / "score_ranges.json").write_text(json.dumps({"clip": 3}))
    with pytest.raises(DataError, match="lowest, highest"):
        load_preferences(str(tmp_path))


def test_bad_input_is_named() -> None:
    dataset = load_preferences(rows(SCORES))
    examples, _ = select_pairs(dataset)
    with pytest.raises(DataError, match="'hps'.*clip"):
        dataset.score_range("hps")
    with pytest.raises(DataError, match="hps"):
        soften(examples, dataset, "hps", (0.0, 1.0))
    with pytest.raises(ConfigError, match="lower first"):
        soften(examples, dataset, "clip", (0.4, 0.4))
    with pytest.raises(ConfigError, match="follow_scores"):
        soften(examples, dataset, "clip", (0.0, 0.4), contradiction="ignore")

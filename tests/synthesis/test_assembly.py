"""The sums of a report, against numbers worked out by hand."""

from __future__ import annotations

import statistics

import pytest

from diffalign.synthesis.assembly import assemble, rank_row
from diffalign.synthesis.candidates import Candidate, Row
from diffalign.synthesis.config import RankingConfig
from diffalign.synthesis.ranking import verdicts
from diffalign.synthesis.report import _models, _report, _sum

NAN = float("nan")
CONFIG = RankingConfig(
    reward_models=["first", "second", {"model": "unseen", "votes": False}], output_dir="out", missing="skip_row"
)


def candidate(pipeline, level, problem=""):
    """A picture whose thumbnail has one level everywhere."""
    return Candidate(pipeline, {"model": pipeline}, bytes([level]), problem, bytes([level]) * 768)


@pytest.fixture(scope="module")
def report():
    agreed = Row(  # base, base, strong: 1 vote, 0 votes, 2 votes from each
        "agreed",
        [candidate("base", 0), candidate("base", 51), candidate("strong", 102)],
        {"first": [0.5, 0.1, 0.9], "second": [5.0, 1.0, 9.0], "unseen": [0.0, 1.0, 2.0]},
    )
    split = Row(  # the two voters say the opposite: all tie
        "split",
        [candidate("base", 0), candidate("base", 0, "black"), candidate("strong", 255)],
        {"first": [1.0, NAN, 0.0], "second": [0.0, NAN, 4.0], "unseen": [1.0, NAN, 0.0]},
    )
    silent = Row(
        "silent",
        [candidate("base", 0), candidate("base", 0), candidate("strong", 0)],
        {"first": [NAN, 0.0, 0.0], "second": [0.0, 0.0, 0.0], "unseen": [0.0, 0.0, 0.0]},
    )
    shards = [assemble(rows, CONFIG, {}) for rows in ([agreed], [split, silent])]
    return _report(_sum([shard.facts for shard in shards]), {}), shards


def test_rows_are_ranked_or_set_aside(report):
    report, (one, two) = report
    assert [row.rank for row, _ in one.rows + two.rows] == [[2, 3, 1], [1, 1]]
    assert [row.preference for row, _ in one.rows + two.rows] == [[0.5, 0.0, 1.0], [0.5, 0.5]]
    assert (report["rows"], report["images"], report["drawn"]) == (2, 5, 9)
    assert (report["ties_for_first"], report["all_tied"]) == (1, 1)
    assert report["set_aside"] == {"some of its pictures": 1, "missing scores of first (rule skip_row)": 1}
    assert report["problems"] == {"base: black": 1}


def test_pipelines(report):
    base, strong = report[0]["by_pipeline"]["base"], report[0]["by_pipeline"]["strong"]
    assert (base["images"], base["not_ranked"], strong["images"], strong["not_ranked"]) == (6, 1, 3, 0)
    assert (base["share_first"], strong["share_first"]) == (pytest.approx(1 / 3), 1.0)
    assert (base["mean_preference"], strong["mean_preference"]) == (pytest.approx(1 / 3), 0.75)
    assert base["diversity"] == pytest.approx((51 / 255 + 0) / 2)  # pairs of its own pictures of a prompt
    assert strong["diversity"] is None
    assert strong["mean_scores"] == {"first": pytest.approx(0.3), "second": pytest.approx(13 / 3), "unseen": 2 / 3}


def test_a_judges_verdict_is_one_whatever_ties_its_scores_have_and_outlives_a_row_set_aside():
    assert verdicts([0.5, 0.5], [0.6], tie=0.2) == [1] and verdicts([0.6, 0.5], tie=0.2) == [0]
    row = Row("p", [candidate("a", 0), candidate("b", 9)], {"judge": [0.9, 0.1], "blind": [NAN, NAN]}, {"judge": [0.9]})
    models = ["judge", "blind"]
    made = assemble([row], RankingConfig(reward_models=models, output_dir="out", missing="skip_row"), {})
    assert not made.rows and made.aside[0]["comparisons"] == [{"name": "judge", "values": [0.9]}]


def test_scores_of_usable_pictures_alone_are_counted(report):
    facts = _sum([shard.facts for shard in report[1]])
    first = _models(facts, {"first": {"id": "first"}}, CONFIG)["first"]
    values = [0.5, 0.1, 0.9, 1.0, 0.0, 0.0, 0.0]  # the black picture was not judged, one judgement is missing
    assert (first["scored"], first["missing"], first["lowest"], first["highest"]) == (7, 1, 0.0, 1.0)
    assert first["mean"] == pytest.approx(statistics.mean(values))
    assert first["deviation"] == pytest.approx(statistics.pstdev(values))


def test_agreement_counts_pairs_that_both_decide(report):
    report, _ = report
    # three pairs of `agreed`, one of `split`; of `silent`, which has no ranking, none
    assert report["agreement"]["first | second"] == 3 / 4
    assert report["agreement"]["first | unseen"] == (2 + 1) / 4
    assert report["contradiction"] == {"first": 0.0, "second": 0.0, "unseen": 1 / 3}  # a tied ranking decides nothing


def test_a_model_without_weight_ranks_nothing_where_all_others_are_silent():
    row = Row("p", [candidate("a", 0), candidate("b", 9)], {"voter": [NAN, 1.0], "weightless": [1.0, 0.0]})
    models = [{"model": "voter"}, {"model": "weightless", "weight": 0.0}]
    for rank_by in ("votes", "weighted_sum"):
        config = RankingConfig(reward_models=models, output_dir="out", rank_by=rank_by)
        assert rank_row(row, config, {}) == "missing scores of voter (rule skip_model)"


def test_nobody_waits_for_a_model_without_weight():
    row = Row("p", [candidate("a", 0), candidate("b", 9)], {"voter": [0.0, 1.0], "weightless": [NAN, 0.0]})
    models = [{"model": "voter"}, {"model": "weightless", "weight": 0.0}]
    for rank_by in ("votes", "weighted_sum"):
        config = RankingConfig(reward_models=models, output_dir="out", rank_by=rank_by, missing="skip_row")
        assert rank_row(row, config, {}).rank == [2, 1]

"""Paired statistics: exact on hand-made numbers, calibrated on simulated ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from diffalign.errors import DataError
from diffalign.evaluation.statistics import (
    bootstrap_mean,
    cluster_ids,
    compare_paired,
    expanded_percentiles,
    holm,
    sign_test,
)

NAN = math.nan


def test_hand_made_pairs():
    result = compare_paired([0, 0, 1, 1, 0], [1, 0, 1, 0, 1], ["a", "a", "b", "b", "c"])
    assert (result.base, result.aligned, result.n, result.prompts) == (0.4, 0.6, 5, 3)
    assert result.difference.mean == pytest.approx(0.2)
    assert (result.wins, result.ties, result.losses) == (0.4, 0.4, 0.2)
    assert result.win_rate.mean == pytest.approx(0.4 + 0.4 / 2)


def test_missing_scores_are_left_out_and_counted_never_zero():
    result = compare_paired([1.0, NAN, 1.0, 1.0], [2.0, 5.0, NAN, 2.0], ["a", "b", "c", "d"])
    assert (result.n, result.missing, result.prompts) == (2, 2, 2)
    assert result.difference.mean == 1.0
    nothing = compare_paired([NAN], [1.0], ["a"]).to_json()
    assert nothing["difference"] == {"mean": None, "ci95": None, "n": 0}
    assert nothing["missing"] == 1


def test_swapping_the_models_mirrors_everything():
    rng = np.random.default_rng(0)
    base, aligned, prompts = rng.normal(size=60), rng.normal(0.2, size=60), [i // 3 for i in range(60)]
    forth, back = compare_paired(base, aligned, prompts), compare_paired(aligned, base, prompts)
    assert forth.difference.low == pytest.approx(-back.difference.high)
    assert forth.win_rate.mean == pytest.approx(1 - back.win_rate.mean)
    assert (forth.wins, forth.losses) == (back.losses, back.wins)


def test_all_ties_are_half_and_certain():
    result = compare_paired([1.0] * 10, [1.0] * 10, range(10))
    assert (result.win_rate.mean, result.win_rate.low, result.win_rate.high) == (0.5, 0.5, 0.5)
    assert (result.difference.low, result.difference.high, result.ties) == (0.0, 0.0, 1.0)


def test_repeating_a_prompts_pictures_does_not_make_the_interval_narrower():
    values = np.random.default_rng(1).normal(size=40)
    once = bootstrap_mean(values)
    copied = bootstrap_mean(np.repeat(values, 8), np.repeat(np.arange(40), 8))
    naive = bootstrap_mean(np.repeat(values, 8))
    assert copied.high - copied.low == pytest.approx(once.high - once.low)
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_a_comparison_is_no_surer_for_more_pictures_of_the_same_prompts():
    change = np.sign(np.random.default_rng(7).normal(0.3, 1.0, 30))
    once = compare_paired(np.zeros(30), change, range(30))
    copied = compare_paired(np.zeros(120), np.repeat(change, 4), np.repeat(np.arange(30), 4).tolist())
    for one, other in ((once.difference, copied.difference), (once.win_rate, copied.win_rate)):
        assert (one.mean, one.low, one.high) == pytest.approx((other.mean, other.low, other.high))


def test_one_prompt_is_resampled_by_its_seeds_and_one_pair_has_no_interval():
    one = bootstrap_mean([0.0, 1.0, 2.0, 3.0], [0, 0, 0, 0])
    assert one.low < 1.5 < one.high
    assert math.isnan(bootstrap_mean([1.0]).low)


def test_the_interval_agrees_with_students_t_on_normal_data():
    values = np.random.default_rng(2).normal(1.0, 2.0, 200)
    interval = bootstrap_mean(values)
    low, high = stats.t.interval(0.95, 199, values.mean(), stats.sem(values))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.02)


@pytest.mark.parametrize(("prompts", "seeds"), [(30, 1), (60, 4)])
def test_95_per_cent_intervals_cover_the_truth_in_93_to_97_per_cent(prompts, seeds):
    rng = np.random.default_rng(3)
    simulations, truth, hits = 1000, 0.1, 0
    ids = np.repeat(np.arange(prompts), seeds)
    for simulation in range(simulations):
        per_prompt = rng.normal(0, 0.4, prompts)[ids]
        interval = bootstrap_mean(
            truth + per_prompt + rng.normal(0, 0.8, len(ids)), ids, seed=simulation, resamples=500
        )
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / simulations <= 0.97


def test_percentiles_are_widened_to_students():
    resampled = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)  # what resampling gives for a deviation of 1
    reach = math.sqrt(6 / 5) * stats.t.ppf(0.975, 5)
    assert expanded_percentiles(resampled, 6) == pytest.approx((-reach, reach), rel=1e-3)


@pytest.mark.parametrize("prompts", [2, 3, 5])
def test_few_prompts_have_wide_intervals_that_cover_the_truth_too(prompts):
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(1000):
        interval = bootstrap_mean(0.1 + rng.normal(size=prompts))
        hits += interval.low <= 0.1 <= interval.high
    assert 0.93 <= hits / 1000 <= 0.97
    values, ids = rng.normal(size=2 * prompts), np.repeat(np.arange(prompts), 2)
    clustered, averaged = bootstrap_mean(values, ids), bootstrap_mean(values.reshape(-1, 2).mean(1))
    assert (clustered.low, clustered.high) == pytest.approx((averaged.low, averaged.high))


def test_a_win_rate_stays_a_share_and_all_wins_are_no_certainty():
    result = compare_paired(np.zeros(5), np.ones(5), range(5)).win_rate
    assert (result.mean, result.high) == (1.0, pytest.approx(1.0)) and result.low == pytest.approx(0.5655, abs=1e-3)
    lost = compare_paired(np.ones(5), np.zeros(5), range(5)).win_rate
    assert lost.mean == 0 and lost.high == pytest.approx(1 - result.low)
    mixed = compare_paired([0, 0, 0], [1, -1, 1], range(3)).win_rate
    assert (mixed.low, mixed.high) == (0.0, 1.0)


def test_a_seed_repeats_the_interval():
    values = np.random.default_rng(4).normal(size=30)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_lists_of_different_length_are_refused():
    with pytest.raises(DataError, match="as many"):
        compare_paired([1.0], [1.0, 2.0], ["a"])


def test_clusters_are_numbered_by_first_appearance():
    assert cluster_ids(["b", "a", "b"]).tolist() == [0, 1, 0]


def test_the_sign_test_counts_prompts_not_pictures():
    base = np.zeros(12)
    better = sign_test(base, [1.0] * 12, [i // 2 for i in range(12)])
    assert (better.wins, better.losses, better.p) == (6, 0, pytest.approx(2 / 2**6))
    mixed = sign_test([0, 0, 0, 0, 0, NAN], [1, -1, 1, 1, -1, 9], ["a", "a", "b", "c", "d", "e"])
    assert (mixed.wins, mixed.losses, mixed.ties) == (2, 1, 1)
    rounded = np.float32([0.3, -0.1, -0.2])  # their sum is not zero in floating point
    assert sign_test(np.zeros(3), rounded, ["a"] * 3).ties == 1
    assert sign_test(np.zeros(2), [1e-9, 2e-9], ["a"] * 2).wins == 1
    assert sign_test([1.0], [1.0], ["a"]).p == 1.0 and math.isnan(sign_test([NAN], [1.0], ["a"]).p)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, NAN]) == pytest.approx([0.03, 0.06, 0.06, NAN], nan_ok=True)
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_without_an_effect_holm_claims_something_in_at_most_5_per_cent_of_studies():
    rng = np.random.default_rng(5)
    studies, scores, prompts = 400, 6, 40
    change = rng.normal(size=(studies, scores, prompts))
    wins = (change > 0).sum(-1)
    p = stats.binom.cdf(np.minimum(wins, prompts - wins), prompts, 0.5) * 2  # the sign test, all at once
    first = sign_test(np.zeros(prompts), change[0, 0], range(prompts))
    assert first.p == pytest.approx(min(p[0, 0], 1.0))
    plain = np.mean([row.min() < 0.05 for row in p])
    assert np.mean([min(holm(row.tolist())) < 0.05 for row in p]) <= 0.05 < plain

"""Intervals against published values, closed forms and properties."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.evaluation.statistics import Estimate, bootstrap, bootstrap_mean, paired_difference, proportion, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_agrees_with_published_intervals(successes, n, low, high):
    estimate = wilson(successes, n)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)
    assert estimate.value == successes / n and estimate.n == n


@given(st.integers(1, 10**6), st.data())
def test_wilson_holds_its_value_within_0_and_1(n, data):
    successes = data.draw(st.integers(0, 2 * n)) / 2  # ties count half
    estimate = wilson(successes, n)
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high


@pytest.mark.parametrize("empty", [lambda: wilson(0, 0), lambda: bootstrap_mean([]), lambda: proportion([], [])])
def test_a_figure_of_nothing_is_refused(empty):
    with pytest.raises(ValueError, match="of nothing"):
        empty()


def test_bootstrap_agrees_with_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=2000).tolist()
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    estimate = bootstrap_mean(values)
    assert estimate.value == pytest.approx(statistics.fmean(values))
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.1)
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.1)


def test_bootstrap_is_the_same_for_the_same_seed_alone():
    values = np.random.default_rng(3).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_repeating_every_value_of_a_prompt_adds_no_certainty():
    values = [0.0, 1.0, 4.0, 2.0, 8.0]
    once = bootstrap_mean(values)
    repeated = bootstrap_mean(values * 10, clusters=list("abcde") * 10)
    assert (repeated.value, repeated.low, repeated.high) == (once.value, once.low, once.high)
    assert repeated.n == 50


def test_clusters_of_unequal_size_keep_their_weight():
    assert bootstrap_mean([1.0, 1.0, 1.0, 5.0], clusters=["a", "a", "a", "b"]).value == 2.0


def test_large_samples_are_resampled_in_blocks_of_bounded_memory():
    estimate = bootstrap_mean([0.0, 1.0] * 30_000)  # 17 resamples a block
    assert estimate.value == 0.5
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(60_000), rel=0.1)


@settings(max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20))
def test_the_bootstrap_interval_holds_its_value(values):
    estimate = bootstrap_mean(values)
    assert min(values) - 1e-9 <= estimate.low <= estimate.value <= estimate.high <= max(values) + 1e-9


def test_a_share_of_single_outcomes_has_wilsons_interval():
    assert proportion([1.0, 0.0, 0.5, 1.0], ["a", "b", "c", "d"]) == wilson(2.5, 4)


def test_a_clustered_share_has_the_interval_of_its_effective_observations():
    found = proportion([1.0, 1.0, 0.0, 0.0, 1.0, 0.0], ["a", "a", "b", "b", "c", "d"])
    # p = ½; sums less p times counts are 1, -1, ½, -½: variance 4/3 · 2.5/36, so 2.7 observations; t of 4 clusters
    for limit in (found.low, found.high):  # Wilson's limits are where (p - π)² = t² π(1 - π)/n
        assert (0.5 - limit) ** 2 == pytest.approx(3.182446**2 * limit * (1 - limit) / 2.7, rel=1e-5)
    assert found.low < 0.5 < found.high


def test_clusters_that_cancel_are_not_surer_than_independent_outcomes():
    outcomes = [1.0, 0.0] * 49 + [1.0, 1.0]  # the variance between clusters is nearly 0
    found = proportion(outcomes, [n // 2 for n in range(100)])
    assert found.high - found.low >= wilson(51, 100).high - wilson(51, 100).low


def test_arrays_and_lists_of_clusters_give_one_answer():
    outcomes, clusters = [1.0, 0.0, 0.0, 1.0, 1.0], [3, 1, 3, 2, 2]
    assert proportion(outcomes, clusters) == proportion(np.array(outcomes), np.array(clusters))


def test_any_statistic_of_sums_is_resampled_as_a_mean_is():
    values = np.random.default_rng(5).normal(size=40)
    sums = np.stack([values, np.ones(40)], 1)
    assert bootstrap(sums, None, lambda s: s[..., 0] / s[..., 1], seed=3) == bootstrap_mean(values, seed=3)


def test_a_perfect_clustered_share_is_as_sure_as_its_clusters_are_many():
    estimate = proportion([1.0] * 20, ["a", "b"] * 10)
    assert (estimate.low, estimate.high, estimate.n) == (wilson(2, 2).low, 1.0, 20)


def test_paired_difference_cancels_what_pairs_share():
    hard_and_easy = [0.0, 100.0, 50.0, 25.0]
    better = [x + 1.0 for x in hard_and_easy]
    difference = paired_difference(better, hard_and_easy)
    assert (difference.value, difference.low, difference.high, difference.n) == (1.0, 1.0, 1.0, 4)


def test_paired_difference_refuses_unequal_sides():
    with pytest.raises(ValueError, match="not 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_values_without_their_clusters_are_refused():
    with pytest.raises(ValueError, match="2 values, but 1 clusters"):
        bootstrap_mean([1.0, 2.0], clusters=["a"])


def test_an_estimate_as_a_dict():
    assert Estimate(1.5, 1.0, 2.0, 10).as_dict() == {"value": 1.5, "low": 1.0, "high": 2.0, "n": 10}

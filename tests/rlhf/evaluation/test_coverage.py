"""95 % intervals cover the truth 93 to 97 times in 100, also of small and clustered samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest

from rlhf.evaluation.agreement import agreement
from rlhf.evaluation.calibration import BINS, expected_calibration_error, fitted_temperature
from rlhf.evaluation.length_bias import length_bias
from rlhf.evaluation.pairs import Labels, Pairs
from rlhf.evaluation.preference import preference
from rlhf.evaluation.ranked_lists import ranked_lists
from rlhf.evaluation.reward_bench import reward_bench_2
from rlhf.evaluation.statistics import Estimate, bootstrap_mean, mean_of_few, paired_difference, proportion

Rng = np.random.Generator


def sizes(rng: Rng, groups: int) -> np.ndarray:
    """Of clusters: the number of each of its members, 1 to 5 a cluster."""
    return np.repeat(np.arange(groups), rng.integers(1, 6, groups))


def clustered_share(rng: Rng, groups: int, p: float) -> Estimate:
    clusters = sizes(rng, groups)
    p_of_cluster = rng.beta(2 * p, 2 * (1 - p), groups)
    return proportion((rng.random(len(clusters)) < p_of_cluster[clusters]).astype(float), clusters)


def clustered_mean(rng: Rng, groups: int) -> Estimate:
    clusters = sizes(rng, groups)
    return bootstrap_mean(rng.normal(size=groups)[clusters] + rng.normal(size=len(clusters)), clusters)


def difference(rng: Rng, groups: int) -> Estimate:
    """Of two models' outcomes on the same pairs: .8 and .7 right, both on the same ones where they can."""
    clusters = sizes(rng, groups)
    draw = rng.random(len(clusters))
    weaker = (draw < 0.7) & (rng.random(len(clusters)) < 0.9)
    return paired_difference((draw < 0.8).astype(float), weaker.astype(float), clusters)


def shared(rng: Rng, clusters: np.ndarray) -> np.ndarray:
    """Standard normal values of which those of a cluster have half of their variance in common."""
    return (rng.normal(size=clusters[-1] + 1)[clusters] + rng.normal(size=len(clusters))) / math.sqrt(2)


def two_scores(rng: Rng, clusters: np.ndarray, correlation: float) -> tuple[np.ndarray, np.ndarray]:
    first_N = shared(rng, clusters)
    return first_N, correlation * first_N + math.sqrt(1 - correlation**2) * shared(rng, clusters)


def correlation(rng: Rng, groups: int, name: str) -> Estimate:
    """Of margin and log length ratio, whose correlation is .5; the partial one where their means are .7 and .3."""
    clusters = sizes(rng, groups)
    margin_N, ratio_N = two_scores(rng, clusters, 0.5)
    if name == "partial_correlation":
        margin_N, ratio_N = margin_N + 0.7, ratio_N + 0.3
    same, one_N = Labels(np.zeros(len(clusters), int), [""]), np.ones(len(clusters))
    lengths_N = 100 * np.exp(ratio_N)
    zero_N, rows_N = 0 * one_N, np.arange(len(clusters))
    pairs = Pairs(rows_N, margin_N, zero_N, lengths_N, 100 * one_N, clusters, one_N, same, same, same, same)
    return length_bias(pairs)[name]


def partial_by_hand() -> float:
    """Regress margin and preference (1, and -1 for the mirror image) on the log length ratio; correlate what is left."""
    moments = np.array([[1 + 0.7**2, 0.5 + 0.7 * 0.3, 0.7], [0.5 + 0.7 * 0.3, 1 + 0.3**2, 0.3], [0.7, 0.3, 1.0]])
    precision = np.linalg.inv(moments)
    return float(-precision[0, 2] / math.sqrt(precision[0, 0] * precision[2, 2]))


def rank_correlation(rng: Rng, groups: int) -> Estimate:
    clusters = sizes(rng, groups)
    return agreement(*two_scores(rng, clusters, 0.8), clusters)["rank_correlation"]


def margins(rng: Rng, temperature: float, clusters: np.ndarray) -> np.ndarray:
    """Of a model that is sure by σ(margin) and right with σ(margin / temperature)."""
    gaps_N = 3 * shared(rng, clusters)
    right_N = rng.random(len(gaps_N)) < 1 / (1 + np.exp(-gaps_N / temperature))
    return np.where(right_N, gaps_N, -gaps_N)


def calibration_error(rng: Rng, groups: int, temperature: float) -> Estimate:
    clusters = sizes(rng, groups)
    return expected_calibration_error(margins(rng, temperature, clusters), clusters)


def temperature(rng: Rng, groups: int) -> Estimate:
    clusters = sizes(rng, groups)
    return fitted_temperature(margins(rng, 2.0, clusters), clusters)


def true_calibration_error(temperature: float) -> float:
    """On a fine grid of |margin|, whose density is that of the normal distribution of σ 3."""
    x = np.linspace(0, 30, 200_001)
    density = np.exp(-(x**2) / 18)
    sure, right = (1 / (1 + np.exp(-x / t)) for t in (1.0, temperature))
    number = np.clip(((sure - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    gaps = [abs((density * (sure - right))[number == n].sum()) for n in range(BINS)]
    return float(sum(gaps) / density.sum())


def win_rate(rng: Rng, groups: int) -> Estimate:
    clusters = np.repeat(np.arange(groups), 4)
    ours_N, theirs_N = shared(rng, clusters) + 0.5, shared(rng, clusters)
    return preference((ours_N, theirs_N), (np.ones(4 * groups), np.ones(4 * groups)), clusters)["win_rate"]


def best_of(rng: Rng, items: int, p: float) -> Estimate:
    """The subset of a benchmark: a proportion p of its items are right."""
    lines = [
        {"form": "best_of", "subset": "Math", "name": "", "prompt": str(n), "correct": 1, "scores": [float(right), 0.5]}
        for n, right in enumerate(rng.random(items) < p)
    ]
    return reward_bench_2(lines)["subsets"]["Math"]


def best_is_best(rng: Rng, lists: int, p: float) -> Estimate:
    lines = [
        {"form": "list", "prompt": str(n), "scores": [0.0, 1.0], "judged": [0.0, 1.0] if right else [1.0, 0.0]}
        for n, right in enumerate(rng.random(lists) < p)
    ]
    found = ranked_lists(lines)["best_is_best"]
    assert isinstance(found, Estimate)
    return found


CASES: dict[str, tuple[Callable[[Rng], Estimate], float]] = {
    "share of 20": (lambda rng: proportion((rng.random(20) < 0.6).astype(float), range(20)), 0.6),
    "share of 200": (lambda rng: proportion((rng.random(200) < 0.7).astype(float), range(200)), 0.7),
    "share in 15 clusters": (lambda rng: clustered_share(rng, 15, 0.6), 0.6),
    "share in 60 clusters": (lambda rng: clustered_share(rng, 60, 0.8), 0.8),
    "mean of 12": (lambda rng: bootstrap_mean(rng.normal(size=12)), 0.0),
    "mean in 20 clusters": (lambda rng: clustered_mean(rng, 20), 0.0),
    "mean in 60 clusters": (lambda rng: clustered_mean(rng, 60), 0.0),
    "difference in 60 clusters": (lambda rng: difference(rng, 60), 0.8 - 0.7 * 0.9),
    "difference in 20 clusters": (lambda rng: difference(rng, 20), 0.8 - 0.7 * 0.9),
    "mean of 3 seeds": (lambda rng: mean_of_few(rng.normal(size=3)), 0.0),
    "correlation in 20 clusters": (lambda rng: correlation(rng, 20, "correlation"), 0.5),
    "correlation in 60 clusters": (lambda rng: correlation(rng, 60, "correlation"), 0.5),
    "partial correlation in 20 clusters": (lambda rng: correlation(rng, 20, "partial_correlation"), partial_by_hand()),
    "rank correlation in 20 clusters": (lambda rng: rank_correlation(rng, 20), 6 / math.pi * math.asin(0.4)),
    "rank correlation in 60 clusters": (lambda rng: rank_correlation(rng, 60), 6 / math.pi * math.asin(0.4)),
    "calibration error in 60 clusters": (lambda rng: calibration_error(rng, 60, 2.0), true_calibration_error(2.0)),
    "calibration error in 30 clusters": (lambda rng: calibration_error(rng, 30, 4.0), true_calibration_error(4.0)),
    "temperature in 60 clusters": (lambda rng: temperature(rng, 60), 2.0),
    "win rate in 40 clusters": (lambda rng: win_rate(rng, 40), NormalDist().cdf(0.5 / math.sqrt(2))),
    "best of 20": (lambda rng: best_of(rng, 20, 0.9), 0.9),
    "best of 20 lists": (lambda rng: best_is_best(rng, 20, 0.9), 0.9),
}


def coverage(case: str, repeats: int) -> float:
    make, truth = CASES[case]
    rng = np.random.default_rng(7)
    return float(np.mean([e.low <= truth <= e.high for e in (make(rng) for _ in range(repeats))]))


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_truth(case: str) -> None:
    """The short form: as many repeats as a second allows, and 3 standard errors more room."""
    repeats = 250
    room = 3 * math.sqrt(0.95 * 0.05 / repeats)
    assert 0.93 - room < coverage(case, repeats) < min(0.97 + room, 0.996)


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_truth_of_2000_samples(case: str) -> None:
    assert 0.93 <= coverage(case, 2000) <= 0.97


def share_above_0(repeats: int) -> float:
    """How often the interval of a calibrated model's error leaves out the truth, 0, below which nothing can be."""
    rng = np.random.default_rng(7)
    return float(np.mean([calibration_error(rng, 60, 1.0).low > 0 for _ in range(repeats)]))


def test_a_calibrated_model_may_be_calibrated() -> None:
    assert share_above_0(250) < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 250)


@pytest.mark.proof
def test_a_calibrated_model_may_be_calibrated_in_2000_samples() -> None:
    assert 0.01 < share_above_0(2000) < 0.04


def test_mcnemar_seldom_finds_a_difference_between_equals() -> None:
    """Exact tests find less than 5 % where nothing is: how much less, the binomial distribution says."""
    rng, found = np.random.default_rng(7), []
    for _ in range(1000):
        a_N, b_N = np.where(rng.random((2, 100)) < 0.7, 1.0, -1.0)
        found.append(agreement(a_N, b_N, np.arange(100))["mcnemar_p"])
    assert 0.01 < np.mean([p < 0.05 for p in found]) < 0.05

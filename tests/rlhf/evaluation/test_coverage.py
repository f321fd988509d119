"""95 % intervals cover the truth 93 to 97 times in 100, also of small and clustered samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from rlhf.evaluation.statistics import Estimate, bootstrap_mean, paired_difference, proportion

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


CASES: dict[str, tuple[Callable[[Rng], Estimate], float]] = {
    "share of 20": (lambda rng: proportion((rng.random(20) < 0.6).astype(float), range(20)), 0.6),
    "share of 200": (lambda rng: proportion((rng.random(200) < 0.7).astype(float), range(200)), 0.7),
    "share in 15 clusters": (lambda rng: clustered_share(rng, 15, 0.6), 0.6),
    "share in 60 clusters": (lambda rng: clustered_share(rng, 60, 0.8), 0.8),
    "mean of 12": (lambda rng: bootstrap_mean(rng.normal(size=12)), 0.0),
    "mean in 20 clusters": (lambda rng: clustered_mean(rng, 20), 0.0),
    "mean in 60 clusters": (lambda rng: clustered_mean(rng, 60), 0.0),
    "difference in 60 clusters": (lambda rng: difference(rng, 60), 0.8 - 0.7 * 0.9),
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
@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_truth_of_2000_samples(case: str) -> None:
    assert 0.93 <= coverage(case, 2000) <= 0.97

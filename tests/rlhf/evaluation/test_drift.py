"""Drift against hand-worked figures, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import kstest

from rlhf.evaluation.drift import chance_of, drift, edges_of, level_of, psi


def test_the_index_by_hand() -> None:
    """Four values below and six above 0 before, nine and one now; half a value more in each bin."""
    there, here = np.array([-1.0] * 4 + [1.0] * 6), np.array([-1.0] * 9 + [1.0])
    p, q = (9.5 / 11, 1.5 / 11), (4.5 / 11, 6.5 / 11)
    expected = (p[0] - q[0]) * math.log(p[0] / q[0]) + (p[1] - q[1]) * math.log(p[1] / q[1])
    assert psi(there, here, np.array([0.0])) == pytest.approx(expected)


def test_bins_hold_equally_many_of_the_baseline() -> None:
    values = np.arange(100.0) ** 3
    counts = np.histogram(values, [-np.inf, *edges_of(values), np.inf])[0]
    assert counts.tolist() == [10] * 10


def test_a_value_on_an_edge_is_in_the_bin_that_ends_there() -> None:
    there, edge = np.array([0.0, 1.0, 2.0, 3.0]), np.array([1.0])
    assert psi(there, np.array([1.0, 1.0]), edge) == pytest.approx(psi(there, np.array([0.0, 0.5]), edge))


def test_equal_values_have_bins_too() -> None:
    assert drift([2.0] * 50, [2.0] * 50).psi == pytest.approx(0)
    assert [drift([2.0] * 50, [other] * 50).level for other in (1.0, 2.0, 3.0)] == ["much", "none", "much"]
    assert drift([0.0] * 48 + [1.0] * 2, [0.0] * 10 + [1.0] * 40).level == "much"
    assert drift([0.0] * 48 + [1.0] * 2, [-1.0] * 40 + [0.0] * 10).level == "much"


def test_the_test_is_that_of_scipy_on_independent_values() -> None:
    rng = np.random.default_rng(0)
    there, here, own = rng.normal(size=200), rng.normal(size=90), rng.normal(size=30)
    expected = kstest(there, own)
    found = drift(there, here, own)
    assert (found.ks, found.p) == (pytest.approx(expected.statistic), pytest.approx(expected.pvalue))
    assert (found.n, found.baseline_n) == (90, 200)
    assert drift(there, here).p == pytest.approx(kstest(there, here).pvalue)


def test_without_drift_5_of_100_samples_are_beyond_chance() -> None:
    rng = np.random.default_rng(1)
    indices = []
    for _ in range(1000):
        there, here = rng.normal(size=1000), rng.normal(size=400)
        indices.append(psi(there, here, edges_of(there)))
    chance = chance_of(10, 1000, 400)
    assert 0.03 < np.mean(np.array(indices) > chance) < 0.07


@pytest.mark.parametrize(
    ("shift", "level"), [(0.0, "none"), (0.4, "some"), (1.0, "much")]
)  # of a normal distribution the index is the shift squared, a little less in bins
def test_a_shifted_mean_is_told(shift: float, level: str) -> None:
    rng = np.random.default_rng(2)
    found = drift(rng.normal(size=20_000), rng.normal(shift, size=20_000))
    assert found.psi == pytest.approx(shift**2, rel=0.12, abs=0.01)
    assert found.level == level
    assert (found.p < 0.01) == (shift > 0)


def test_few_values_are_no_drift() -> None:
    rng = np.random.default_rng(3)
    levels = [drift(rng.normal(size=100), rng.normal(size=10)).level for _ in range(200)]
    assert np.mean([level == "none" for level in levels]) > 0.9
    assert [level_of(0.3, 0.4), level_of(0.3, 0.2), level_of(0.2, 0.1), level_of(0.09, 0.01)] == [
        "none",
        "much",
        "some",
        "none",
    ]


def test_nothing_has_no_drift() -> None:
    with pytest.raises(ValueError, match="nothing"):
        drift([], [1.0])

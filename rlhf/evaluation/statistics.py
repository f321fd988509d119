"""95 % intervals of proportions, means and paired differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def wilson(successes: float, n: int) -> Estimate:
    """Proportion of successes with Wilson's score interval. A tie is half a success; the interval of a half lies midway
    between those of the whole numbers next to it.

    Raises ValueError for n = 0.
    """
    if n <= 0:
        raise ValueError("a proportion of nothing has no value")
    whole = (math.floor(successes), math.ceil(successes))
    low, high = np.mean([binomtest(k, n).proportion_ci(method="wilson") for k in whole], axis=0)
    return _estimate(successes / n, low, high, n, within=(0.0, 1.0))


def bootstrap_mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None, seed: int = 0) -> Estimate:
    """Mean with the percentile interval of 1,000 bootstrap resamples (Efron 1979).

    `clusters` names the prompt, say, of each value: whole clusters are drawn, since values that share one are not
    independent. None: every value is its own. A single cluster has no spread to estimate, and gives an empty interval.
    Raises ValueError without values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("a mean of nothing has no value")
    sums, counts = _per_cluster(array, clusters)
    rng = np.random.default_rng(seed)
    block = max(1, 2**20 // len(sums))  # resamples at once: bounds the memory
    means = []
    for start in range(0, RESAMPLES, block):
        drawn = rng.integers(len(sums), size=(min(block, RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return _estimate(array.mean(), low, high, array.size)


def proportion(outcomes: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of outcomes of 0, ½ and 1: Wilson's interval if every cluster has one outcome, else clustered bootstrap.

    Where the bootstrap finds no width (outcomes all equal), Wilson's interval for as many observations as clusters.
    """
    if not outcomes:
        raise ValueError("a proportion of nothing has no value")
    groups = len(set(clusters))
    if groups < len(outcomes):
        clustered = bootstrap_mean(outcomes, clusters)
        if clustered.low < clustered.high:
            return clustered
    of_groups = wilson(sum(outcomes) / len(outcomes) * groups, groups)
    return Estimate(of_groups.value, of_groups.low, of_groups.high, len(outcomes))


def paired_difference(a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """Mean of a - b over pairs measured on the same prompt; above 0: a is larger. Interval as in `bootstrap_mean`."""
    if len(a) != len(b):
        raise ValueError(f"pairs need as many values on each side, not {len(a)} and {len(b)}")
    return bootstrap_mean(np.subtract(a, b).tolist(), clusters)


def _per_cluster(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each cluster."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values, but {len(clusters)} clusters")
    number_of: dict[Hashable, int] = {}
    member = [number_of.setdefault(cluster, len(number_of)) for cluster in clusters]
    return np.bincount(member, weights=values), np.bincount(member).astype(np.float64)


def _estimate(
    value: float, low: float, high: float, n: int, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Plain floats; rounding puts no value outside its own interval and no interval outside its range."""
    low, high = max(min(low, value), within[0]), min(max(high, value), within[1])
    return Estimate(float(value), float(low), float(high), int(n))

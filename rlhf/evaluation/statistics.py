"""95 % intervals of proportions, means, paired differences, and whatever else follows from sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import binomtest, norm
from scipy.stats import t as student

RESAMPLES = 1000
Values = Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray


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
    return estimate(successes / n, low, high, n, within=(0.0, 1.0))


def bootstrap_mean(values: Values, clusters: Clusters | None = None, seed: int = 0) -> Estimate:
    """Mean with the expanded percentile interval of 1,000 bootstrap resamples (Efron 1979; Hesterberg 2015, §4.3).

    `clusters` names the prompt, say, of each value: whole clusters are drawn, since values that share one are not
    independent. None: every value is its own. A single cluster has no spread to estimate, and gives an empty interval.
    Raises ValueError without values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise ValueError("a mean of nothing has no value")
    columns = np.stack([array, np.ones_like(array)], 1)
    return bootstrap(columns, clusters, lambda sums: sums[..., 0] / sums[..., 1], seed)


def bootstrap(
    columns_NK: np.ndarray, clusters: Clusters | None, statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> Estimate:
    """A statistic of the sums of K columns (…, K) → (…), with the interval of `bootstrap_mean`."""
    sums_GK = sums_by_cluster(columns_NK, clusters)
    low, high = expanded_percentiles(statistic(resampled_sums(sums_GK, seed)), len(sums_GK))
    return estimate(float(statistic(sums_GK.sum(0))), low, high, len(columns_NK))


def resampled_sums(sums_GK: np.ndarray, seed: int = 0) -> np.ndarray:
    """The sums over G clusters drawn with replacement, for each of 1,000 resamples."""
    groups, rng = len(sums_GK), np.random.default_rng(seed)
    block = max(1, 2**20 // groups)  # resamples at once: bounds the memory
    found = []
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        drawn = rng.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        found.append(np.bincount(drawn.ravel(), minlength=size * groups).reshape(size, groups) @ sums_GK)
    return np.concatenate(found)


def expanded_percentiles(resampled: np.ndarray, groups: int) -> tuple[float, float]:
    """Percentiles that leave a little less than 2.5 % outside, see `few_clusters`."""
    tail = float(norm.cdf(norm.ppf(0.025) * few_clusters(groups)))
    known = resampled[np.isfinite(resampled)]
    low, high = np.quantile(known, [tail, 1 - tail]) if known.size else (np.nan, np.nan)
    return float(low), float(high)


def few_clusters(groups: int) -> float:
    """By how much a bootstrap of few clusters is too narrow: √((G - 1)/G), and what separates Student's t from the normal
    distribution.
    """
    stretch = math.sqrt(groups / (groups - 1)) if groups > 1 else 1.0
    return stretch * float(student.ppf(0.025, max(groups - 1, 1)) / norm.ppf(0.025))


def proportion(outcomes: Values, clusters: Clusters) -> Estimate:
    """Mean of outcomes from 0 to 1, nearly all of them 0, ½ or 1, with Wilson's interval.

    Where clusters have several outcomes, the interval is that of the effective sample size, p(1 - p) over the
    clustered variance of p, with Student's t for the number of clusters (Dean and Pagano 2015). Where the outcomes are
    all equal, they tell no variance, and a cluster counts as one observation.
    """
    array = np.asarray(outcomes, dtype=np.float64)
    if not array.size:
        raise ValueError("a proportion of nothing has no value")
    sums_G, counts_G = sums_by_cluster(np.stack([array, np.ones_like(array)], 1), clusters).T
    groups = len(sums_G)
    if groups == array.size:
        return wilson(float(array.sum()), groups)
    p = float(array.mean())
    variance = float(((sums_G - p * counts_G) ** 2).sum()) / array.size**2 * groups / max(groups - 1, 1)
    if variance == 0:
        of_groups = wilson(p * groups, groups)
        return estimate(p, of_groups.low, of_groups.high, array.size, within=(0.0, 1.0))
    n = min(p * (1 - p) / variance, array.size)
    quantile = float(student.ppf(0.975, groups - 1))
    middle, scale = p + quantile**2 / (2 * n), 1 + quantile**2 / n
    half = quantile * math.sqrt(p * (1 - p) / n + quantile**2 / (4 * n**2))
    return estimate(p, (middle - half) / scale, (middle + half) / scale, array.size, within=(0.0, 1.0))


def paired_difference(a: Values, b: Values, clusters: Clusters | None = None) -> Estimate:
    """Mean of a - b over pairs measured on the same prompt; above 0: a is larger. Interval as in `bootstrap_mean`."""
    if len(a) != len(b):
        raise ValueError(f"pairs need as many values on each side, not {len(a)} and {len(b)}")
    return bootstrap_mean(np.subtract(a, b), clusters)


def differences(a: Sequence[float | None], b: Sequence[float | None]) -> list[float | None]:
    """a - b, None where either is missing."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def known_only(values: Sequence[float | None], clusters: Sequence[Hashable]) -> tuple[list[float], list[Hashable]]:
    """The values that are not missing, and their clusters."""
    known = [(value, own) for value, own in zip(values, clusters, strict=True) if value is not None]
    return [value for value, _ in known], [own for _, own in known]


def mean_of_known(values: Sequence[float | None], clusters: Sequence[Hashable]) -> Estimate | None:
    """`bootstrap_mean` of the values that are not missing; None if all are."""
    known, own = known_only(values, clusters)
    return bootstrap_mean(known, own) if known else None


def mean_of_few(values: Values) -> Estimate:
    """Mean of independent repeats, such as seeds, with Student's t interval. Raises ValueError for fewer than 2."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        raise ValueError("the spread of fewer than 2 values is not known")
    half = float(student.ppf(0.975, array.size - 1)) * float(array.std(ddof=1)) / math.sqrt(array.size)
    mean = float(array.mean())
    return estimate(mean, mean - half, mean + half, array.size)


def sums_by_cluster(columns_NK: np.ndarray, clusters: Clusters | None) -> np.ndarray:
    """sums_GK of each cluster, a row per cluster."""
    if clusters is None:
        return columns_NK
    if len(clusters) != len(columns_NK):
        raise ValueError(f"{len(columns_NK)} values, but {len(clusters)} clusters")
    if isinstance(clusters, np.ndarray):
        member = np.unique(clusters, return_inverse=True)[1]
    else:
        number_of: dict[Hashable, int] = {}
        member = np.array([number_of.setdefault(cluster, len(number_of)) for cluster in clusters])
    return np.stack([np.bincount(member, weights=column) for column in columns_NK.T], 1)


def estimate(
    value: float, low: float, high: float, n: int, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Plain floats; rounding puts no value outside its own interval and no interval outside its range."""
    low, high = max(min(low, value), within[0]), min(max(high, value), within[1])
    return Estimate(float(value), float(low), float(high), int(n))

"""How far values of today differ from those of an evaluation: population stability index and Kolmogorov-Smirnov test."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.stats import chi2, ks_2samp

from rlhf.evaluation.statistics import Values

BINS = 10
SOME, MUCH = 0.1, 0.25
"""The rule of thumb for the index of credit scores (Lewis 1994, "An Introduction to Credit Scoring"; Siddiqi 2006)."""
Level = Literal["none", "some", "much"]


class Drift(NamedTuple):
    psi: float
    chance: float
    """95 of 100 samples of this size without drift have a smaller index."""
    level: Level
    ks: float
    p: float
    n: int
    baseline_n: int


def drift(baseline: Values, now: Values, independent: Values | None = None) -> Drift:
    """`independent`: those of `now` that no common conversation ties together, which the test asks for; None: all.

    ValueError without values.
    """
    there, here = np.asarray(baseline, dtype=np.float64), np.asarray(now, dtype=np.float64)
    if not (there.size and here.size):
        raise ValueError("nothing has no drift")
    edges = edges_of(there)
    index, chance = psi(there, here, edges), chance_of(len(edges) + 1, there.size, here.size)
    test: Any = ks_2samp(there, here if independent is None else independent)
    return Drift(
        index, chance, level_of(index, chance), float(test.statistic), float(test.pvalue), here.size, there.size
    )


def edges_of(baseline: np.ndarray) -> np.ndarray:
    """Between ten bins with equally many values of the baseline; fewer, where values are equal. Where nearly all are,
    they have a bin of their own between the smaller and the larger ones.
    """
    edges = np.unique(np.quantile(baseline, np.arange(1, BINS) / BINS))
    return edges if len(edges) > 1 else np.array([np.nextafter(edges[0], -np.inf), edges[0]])


def psi(there: np.ndarray, here: np.ndarray, edges: np.ndarray) -> float:
    """Σ (p - q) ln(p / q) over the bins, which end with their edge. Half a value is added to each bin, so that an empty
    one is no infinity.
    """
    p, q = _proportions(here, edges), _proportions(there, edges)
    return float(((p - q) * np.log(p / q)).sum())


def chance_of(bins: int, there: int, here: int) -> float:
    """The index is (1/M + 1/N) · χ² with bins - 1 degrees of freedom where nothing has changed (Yurdakul and Naranjo 2020,
    "Statistical properties of the population stability index")."""
    return float(chi2.ppf(0.95, bins - 1)) * (1 / there + 1 / here)


def level_of(index: float, chance: float) -> Level:
    """Few values have a large index by chance alone, which is no drift."""
    if index < SOME or index <= chance:
        return "none"
    return "some" if index < MUCH else "much"


def _proportions(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) + 0.5
    return counts / counts.sum()

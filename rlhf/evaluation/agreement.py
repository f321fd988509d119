"""Whether two reward models differ on the same pairs, and how far they agree."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest, rankdata

from rlhf.evaluation.statistics import bootstrap, paired_difference, proportion


def agreement(a_N: np.ndarray, b_N: np.ndarray, prompts_N: np.ndarray) -> dict[str, Any]:
    """Of two models' margins (chosen less rejected score) on the same pairs:

    difference        accuracy of a less that of b, pair by pair
    same_preference   proportion of pairs on which both prefer the same response
    only_a, only_b    pairs that only one of them ranks right; ties of scores are left out
    mcnemar_p         exact McNemar test: probability of counts so uneven if both were right equally often. It takes pairs
                      for independent; where prompts repeat, `difference` is the safer figure
    rank_correlation  Spearman's, of the margins
    """
    wins_a_N, wins_b_N = (np.where(margin_N == 0, 0.5, margin_N > 0) for margin_N in (a_N, b_N))
    only_a, only_b = (int(((x == 1) & (y == 0)).sum()) for x, y in ((wins_a_N, wins_b_N), (wins_b_N, wins_a_N)))
    found: dict[str, Any] = {
        "difference": paired_difference(wins_a_N, wins_b_N, prompts_N),
        "same_preference": proportion((wins_a_N == wins_b_N).astype(float), prompts_N),
        "only_a": only_a,
        "only_b": only_b,
        "mcnemar_p": float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0,
    }
    ranks_a_N, ranks_b_N = (rankdata(margin_N) for margin_N in (a_N, b_N))
    if np.ptp(ranks_a_N) and np.ptp(ranks_b_N):
        ranks_a_N, ranks_b_N = ranks_a_N - ranks_a_N.mean(), ranks_b_N - ranks_b_N.mean()  # sums lose no digits
        columns = [ranks_a_N, ranks_b_N, ranks_a_N**2, ranks_b_N**2, ranks_a_N * ranks_b_N, np.ones_like(ranks_a_N)]
        found["rank_correlation"] = bootstrap(np.stack(columns, 1), prompts_N, _correlation)
    return found


def _correlation(sums: np.ndarray) -> np.ndarray:
    """Pearson's correlation from the sums of a, b, a², b², ab and 1."""
    a, b, aa, bb, ab, n = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (ab - a * b / n) / np.sqrt((aa - a * a / n) * (bb - b * b / n))

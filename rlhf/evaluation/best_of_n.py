"""The score of the best of n samples, for n up to the number that was sampled."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np

from rlhf.evaluation.statistics import Clusters, bootstrap_mean


def best_of_n(selecting_PS: np.ndarray, valued_PS: np.ndarray, clusters: Clusters) -> list[dict[str, Any]]:
    """`size` n and `score` of the response that `selecting` ranks first among n of the S samples of a prompt, valued by
    `valued`: the mean over all subsets of n samples, which is unbiased, and over P ≥ 1 prompts. n is 1, 2, 4, … and S.

    With equal arguments it is the reward that best-of-n reaches; with another reward as `valued`, what that is worth.
    """
    S = selecting_PS.shape[1]
    sizes = sorted({1 << power for power in range(S.bit_length()) if 1 << power <= S} | {S})
    return [
        {"size": n, "score": bootstrap_mean((weights_of_best(selecting_PS, n) * valued_PS).sum(1), clusters)}
        for n in sizes
    ]


def weights_of_best(scores_PS: np.ndarray, n: int) -> np.ndarray:
    """weights_PS: the probability that each sample is the best of n of them, drawn without replacement. The one of rank i
    from below is the best of C(i - 1, n - 1) of C(S, n) subsets; equal scores share their ranks.
    """
    P, S = scores_PS.shape
    of_rank_S = np.array([comb(rank, n - 1) / comb(S, n) for rank in range(S)])
    weights_PS = np.empty((P, S))
    for p, scores_S in enumerate(scores_PS):
        _, group_S, count_G = np.unique(scores_S, return_inverse=True, return_counts=True)
        ends_G = count_G.cumsum()
        sums_G = np.add.reduceat(of_rank_S, ends_G - count_G)
        weights_PS[p] = (sums_G / count_G)[group_S]
    return weights_PS

"""Which of two policies a reward prefers, prompt by prompt."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import expit
from scipy.stats import t as student

from rlhf.evaluation.statistics import Clusters, Estimate, estimate, paired_difference, proportion, sums_by_cluster

STEPS = 50  # of Newton's method; it needs fewer than ten


def preference(
    scores_N: tuple[np.ndarray, np.ndarray], lengths_N: tuple[np.ndarray, np.ndarray], clusters: Clusters
) -> dict[str, Estimate]:
    """Of the scores and lengths of two policies' responses to the same N ≥ 1 prompts:

    win_rate           proportion of responses of the first that score higher; a tie counts half
    ties               proportion of equal scores
    length_controlled  the win rate if both were equally long, see `length_controlled`
    difference         mean score of the first less that of the second
    """
    a_N, b_N = scores_N
    wins_N = np.where(a_N == b_N, 0.5, a_N > b_N)
    return {
        "win_rate": proportion(wins_N, clusters),
        "ties": proportion((a_N == b_N).astype(float), clusters),
        "length_controlled": length_controlled(wins_N, lengths_N[0] - lengths_N[1], clusters),
        "difference": paired_difference(a_N, b_N, clusters),
    }


def length_controlled(wins_N: np.ndarray, longer_by_N: np.ndarray, clusters: Clusters) -> Estimate:
    """The win rate at equal length, as in AlpacaEval 2 (Dubois et al. 2024, arXiv 2404.04475) without its term for the
    difficulty of a prompt: a logistic regression P(win) = σ(α + β tanh(d / s)) on the difference of lengths d, whose
    standard deviation is s, gives σ(α).

    One win and one loss of weight ½ at each of tanh(d / s) = ±1 keep it finite where one side always wins. The interval
    is that of α with a variance clustered by prompt, in which these count as one more cluster.
    """
    spread = float(longer_by_N.std())
    x_N = np.tanh(longer_by_N / spread) if spread else np.zeros(len(wins_N))
    x_NK = np.stack([np.ones(len(wins_N) + 2), np.append(x_N, [-1.0, 1.0])], 1)
    y_N, weight_N = np.append(wins_N, [0.5, 0.5]), np.append(np.ones(len(wins_N)), [0.5, 0.5])
    theta_K = np.zeros(2)
    for _ in range(STEPS):
        p_N = expit(x_NK @ theta_K)
        bread_KK = x_NK.T @ (x_NK * (weight_N * p_N * (1 - p_N))[:, None])
        step_K = np.linalg.solve(bread_KK, x_NK.T @ (weight_N * (y_N - p_N)))
        theta_K = theta_K + step_K
        if np.abs(step_K).max() < 1e-10:
            break
    residual_NK = x_NK * (weight_N * (y_N - expit(x_NK @ theta_K)))[:, None]
    sums_GK = np.concatenate([sums_by_cluster(residual_NK[:-2], clusters), residual_NK[-2:].sum(0, keepdims=True)])
    groups = len(sums_GK)
    inverse_KK = np.linalg.inv(bread_KK)
    variance_KK = inverse_KK @ (sums_GK.T @ sums_GK) @ inverse_KK * groups / (groups - 1)
    half = float(student.ppf(0.975, groups - 1)) * math.sqrt(variance_KK[0, 0])
    low, value, high = expit(np.array([theta_K[0] - half, theta_K[0], theta_K[0] + half]))
    return estimate(value, low, high, len(wins_N), within=(0.0, 1.0))

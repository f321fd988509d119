"""How far a reward model prefers length, and what it knows beyond it."""

from __future__ import annotations

import numpy as np

from rlhf.evaluation.pairs import Pairs
from rlhf.evaluation.reward_accuracy import wins
from rlhf.evaluation.statistics import Estimate, bootstrap, proportion


def length_bias(pairs: Pairs) -> dict[str, Estimate]:
    """Of score margins and log length ratios. Which response stands first is a matter of chance, so correlations are those
    of the pairs together with their mirror images: their means are 0.

    chosen_is_longer   proportion of pairs whose chosen response is longer; equal lengths count half
    prefers_longer     proportion whose longer response has the higher score, among pairs of unequal length
    longer_chosen      accuracy where the chosen response is the longer one
    shorter_chosen     accuracy where the chosen response is the shorter one: low where a model only counts
    correlation        of margin and log length ratio (Pearson)
    partial_correlation  of margin and preference, given the log length ratio: what the score says beyond length
    """
    ours_N, longer_N = wins(pairs.chosen_N, pairs.rejected_N), wins(pairs.chosen_length_N, pairs.rejected_length_N)
    unequal_N = longer_N != 0.5
    found = {
        "chosen_is_longer": proportion(longer_N, pairs.prompts_N),
        **_proportion("prefers_longer", np.where(longer_N == 1, ours_N, 1 - ours_N), unequal_N, pairs),
        **_proportion("longer_chosen", ours_N, longer_N == 1, pairs),
        **_proportion("shorter_chosen", ours_N, longer_N == 0, pairs),
    }
    margin_N, ratio_N = pairs.margin_N, pairs.log_length_ratio_N
    if margin_N.any() and ratio_N.any():
        products_NK = np.stack([margin_N**2, ratio_N**2, margin_N * ratio_N, margin_N, ratio_N, np.ones(len(pairs))], 1)
        found["correlation"] = bootstrap(products_NK, pairs.prompts_N, _correlation)
        if np.isfinite(_partial(products_NK.sum(0))):
            found["partial_correlation"] = bootstrap(products_NK, pairs.prompts_N, _partial)
    return found


def _proportion(name: str, outcomes_N: np.ndarray, mask_N: np.ndarray, pairs: Pairs) -> dict[str, Estimate]:
    return {name: proportion(outcomes_N[mask_N], pairs.prompts_N[mask_N])} if mask_N.any() else {}


def _correlation(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 2] / np.sqrt(sums[..., 0] * sums[..., 1])


def _partial(sums: np.ndarray) -> np.ndarray:
    """The preference of a pair is 1 and that of its mirror image -1, so its products are the variables themselves."""
    with np.errstate(invalid="ignore", divide="ignore"):
        score_length = _correlation(sums)
        score_preference = sums[..., 3] / np.sqrt(sums[..., 0] * sums[..., 5])
        length_preference = sums[..., 4] / np.sqrt(sums[..., 1] * sums[..., 5])
        rest = np.sqrt((1 - score_length**2) * (1 - length_preference**2))
        return (score_preference - score_length * length_preference) / rest

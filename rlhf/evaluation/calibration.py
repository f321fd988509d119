"""Whether σ(score gap) is the probability that the response with the higher score is the one that people chose."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import t as student

from rlhf.evaluation.statistics import (
    Estimate,
    bootstrap_mean,
    estimate,
    few_clusters,
    proportion,
    resampled_sums,
    sums_by_cluster,
)

BINS = 10  # equal bins of confidence, from ½ to 1
FLATTEST, STEEPEST = 1e-4, 1e4  # of 1 / temperature


def calibration(margin_N: np.ndarray, prompts_N: np.ndarray) -> dict[str, Any]:
    """Of margins (chosen less rejected score):

    bins                by confidence σ(|margin|): edges, the mean confidence `predicted`, the `observed` accuracy
    ece                 expected calibration error: mean over pairs of |predicted - observed| of their bin (Guo et al. 2017)
    brier               mean (1 - σ(margin))²: 0 is sure and right, ¼ knows nothing
    nll                 mean -log σ(margin), the loss of training without margins: log 2 knows nothing
    temperature         T for which σ(margin / T) fits best: above 1 the model is overconfident
    ece_at_temperature  ECE of margin / T
    """
    temperature = fitted_temperature(margin_N, prompts_N)
    found = {
        "ece": expected_calibration_error(margin_N, prompts_N),
        "brier": bootstrap_mean((1 - expit(margin_N)) ** 2, prompts_N),
        "nll": bootstrap_mean(np.logaddexp(0, -margin_N), prompts_N),
        "temperature": temperature,
        "ece_at_temperature": expected_calibration_error(margin_N / temperature.value, prompts_N),
    }
    return {**found, "bins": reliability(margin_N, prompts_N)}


def reliability(margin_N: np.ndarray, prompts_N: np.ndarray) -> list[dict[str, Any]]:
    """The bins that have pairs."""
    confidence_N, wins_N = expit(np.abs(margin_N)), _wins(margin_N)
    bin_N = _bins(confidence_N)
    return [
        {
            "low": 0.5 + 0.5 * number / BINS,
            "high": 0.5 + 0.5 * (number + 1) / BINS,
            "predicted": float(confidence_N[bin_N == number].mean()),
            "observed": proportion(wins_N[bin_N == number], prompts_N[bin_N == number]),
        }
        for number in np.unique(bin_N)
    ]


def expected_calibration_error(margin_N: np.ndarray, prompts_N: np.ndarray) -> Estimate:
    """Noise in the bins adds to the error of a sample, most of all where the model is calibrated, so percentiles of a
    bootstrap would leave the truth out. The interval has the multiples of the observed gaps under which, with the noise of
    the resamples, an error as large and an error as small as the observed one are not among the rarest 2.5 %.
    """
    sums_GB = sums_by_cluster(confidence_gaps(margin_N), prompts_N)
    gap_B = _per_pair(sums_GB.sum(0))
    value = float(error_of(sums_GB.sum(0)))
    noise_RB = (_per_pair(resampled_sums(sums_GB)) - gap_B) * few_clusters(len(sums_GB))
    low, high = (_error_with(gap_B, noise_RB, tail) for tail in (0.975, 0.025))
    return estimate(value, low, high, len(margin_N), within=(0.0, 1.0))


def confidence_gaps(margin_N: np.ndarray) -> np.ndarray:
    """A row per pair: confidence less outcome in the column of its bin, and 1 in the last, which counts the pairs."""
    confidence_N = expit(np.abs(margin_N))
    gaps_NB = np.zeros((len(margin_N), BINS + 1))
    gaps_NB[np.arange(len(margin_N)), _bins(confidence_N)] = confidence_N - _wins(margin_N)
    gaps_NB[:, BINS] = 1
    return gaps_NB


def error_of(sums: np.ndarray) -> np.ndarray:
    """The calibration error from sums of such rows."""
    return np.abs(_per_pair(sums)).sum(-1)


def _per_pair(sums: np.ndarray) -> np.ndarray:
    return sums[..., :BINS] / sums[..., BINS:]


def _error_with(gap_B: np.ndarray, noise_RB: np.ndarray, tail: float) -> float:
    """The error of the multiple of `gap_B` to which noise adds so much that a proportion `tail` of the resamples stays
    within the error of `gap_B` itself; 0 if more noise is needed than there is.
    """
    error = float(np.abs(gap_B).sum())

    def beyond(factor: float) -> float:
        return tail - float((np.abs(factor * gap_B + noise_RB).sum(1) <= error).mean())

    if error == 0 or beyond(0.0) >= 0:
        return 0.0
    most = 1 + float(np.abs(noise_RB).sum(1).max()) / error
    return error * float(brentq(beyond, 0.0, most, xtol=1e-6))  # type: ignore[arg-type]


def fitted_temperature(margin_N: np.ndarray, prompts_N: np.ndarray) -> Estimate:
    """T by maximum likelihood, with the interval of the clustered (sandwich) variance of 1 / T.

    1 / T stays between 0.0001 and 10,000: margins that are all right would make it infinite, and margins that are wrong
    more often than right would make it negative.
    """

    def slope(inverse: float) -> float:
        return float((margin_N * expit(-inverse * margin_N)).sum())

    if slope(FLATTEST) <= 0:
        inverse = FLATTEST
    elif slope(STEEPEST) > 0:
        inverse = STEEPEST
    else:
        inverse = float(brentq(slope, FLATTEST, STEEPEST, xtol=1e-12))  # type: ignore[arg-type]
    p_N = expit(-inverse * margin_N)
    scores_G = sums_by_cluster((margin_N * p_N)[:, None], prompts_N)[:, 0]
    groups, curvature = len(scores_G), float((margin_N**2 * p_N * (1 - p_N)).sum())
    if groups < 2 or curvature <= 0:
        return estimate(1 / inverse, 1 / STEEPEST, 1 / FLATTEST, len(margin_N))
    spread = np.sqrt((scores_G**2).sum() * groups / (groups - 1)) / curvature * student.ppf(0.975, groups - 1)
    low, high = (1 / np.clip(inverse + side * spread, FLATTEST, STEEPEST) for side in (1, -1))
    return estimate(1 / inverse, low, high, len(margin_N))


def _wins(margin_N: np.ndarray) -> np.ndarray:
    return np.where(margin_N == 0, 0.5, margin_N > 0)


def _bins(confidence_N: np.ndarray) -> np.ndarray:
    return np.minimum(((confidence_N - 0.5) * 2 * BINS).astype(int), BINS - 1)

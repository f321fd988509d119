"""Calibration against figures counted by hand, scipy's optimiser and samples whose temperature is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import expit

from rlhf.evaluation.calibration import calibration, expected_calibration_error, fitted_temperature, reliability

LOGIT_6, LOGIT_9 = math.log(1.5), math.log(9)  # σ of them is .6 and .9
# six pairs at confidence .62 of which three are right, and four at .9 of which all are
MARGINS = np.array([LOGIT_6 + 0.08] * 3 + [-LOGIT_6 - 0.08] * 3 + [LOGIT_9 + 0.01] * 4)
EACH = np.arange(10)


def test_reliability_and_ece_by_hand() -> None:
    low, high = (float(expit(margin)) for margin in (LOGIT_6 + 0.08, LOGIT_9 + 0.01))
    first, second = reliability(MARGINS, EACH)
    assert (first["low"], first["observed"].value, first["observed"].n) == (0.6, 0.5, 6)
    assert (second["low"], second["observed"].value, second["observed"].n) == (0.9, 1.0, 4)
    assert (first["predicted"], second["predicted"]) == (pytest.approx(low), pytest.approx(high))
    expected = 0.6 * (low - 0.5) + 0.4 * (1.0 - high)
    assert expected_calibration_error(MARGINS, EACH).value == pytest.approx(expected)


def test_brier_and_nll_by_hand() -> None:
    found = calibration(np.array([LOGIT_9, -LOGIT_9, 0.0]), np.arange(3))
    assert found["brier"].value == pytest.approx((0.1**2 + 0.9**2 + 0.5**2) / 3)
    assert found["nll"].value == pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.5)) / 3)


def test_temperature_is_that_of_a_general_optimiser() -> None:
    margins = np.random.default_rng(0).normal(0.5, 2.0, 300)
    best: Any = minimize_scalar(lambda log_t: np.logaddexp(0, -margins / math.exp(log_t)).sum(), bounds=(-5, 5))
    assert fitted_temperature(margins, np.arange(300)).value == pytest.approx(math.exp(best.x), rel=1e-3)


def sample(rng: np.random.Generator, n: int, temperature: float) -> np.ndarray:
    """Margins whose probability to be right is σ(margin / temperature)."""
    gaps = rng.normal(0, 3, n)
    return np.where(rng.random(n) < expit(gaps / temperature), gaps, -gaps)


def test_the_interval_of_the_temperature_covers_it() -> None:
    rng = np.random.default_rng(1)
    found = [fitted_temperature(sample(rng, 150, 2.0), np.arange(150)) for _ in range(300)]
    assert 0.91 < np.mean([one.low <= 2.0 <= one.high for one in found]) < 0.985


def test_the_calibration_error_of_a_calibrated_model_may_be_0() -> None:
    rng = np.random.default_rng(2)
    found = [expected_calibration_error(sample(rng, 200, 1.0), np.arange(200)) for _ in range(20)]
    assert np.mean([one.low < 0.02 for one in found]) > 0.8
    overconfident = expected_calibration_error(sample(rng, 2000, 4.0), np.arange(2000))
    assert overconfident.low > 0.1


def test_repeated_pairs_of_a_prompt_add_no_certainty() -> None:
    margins = sample(np.random.default_rng(3), 100, 1.5)
    once = fitted_temperature(margins, np.arange(100))
    often = fitted_temperature(np.repeat(margins, 5), np.repeat(np.arange(100), 5))
    assert (often.low, often.high) == (pytest.approx(once.low), pytest.approx(once.high))


@pytest.mark.parametrize(("margins", "limit"), [([1.0, 2.0], 1e-4), ([-1.0, -2.0], 1e4)])
def test_temperatures_without_end_stop(margins: list[float], limit: float) -> None:
    assert fitted_temperature(np.array(margins), np.arange(2)).value == pytest.approx(limit)

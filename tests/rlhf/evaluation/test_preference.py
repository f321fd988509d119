"""Win rates: by hand, against scipy's optimizer, and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit

from rlhf.evaluation.preference import length_controlled, preference

RNG = np.random.default_rng(3)


def test_worked_by_hand() -> None:
    """Four prompts: two wins, a tie, a loss."""
    a, b = np.array([3.0, 1.0, 2.0, 0.0]), np.array([1.0, 0.5, 2.0, 4.0])
    found = preference((a, b), (np.full(4, 9.0), np.full(4, 9.0)), ["p", "q", "r", "s"])
    assert found["win_rate"].value == 2.5 / 4
    assert found["ties"].value == 1 / 4
    assert found["difference"].value == pytest.approx((2 + 0.5 + 0 - 4) / 4)
    # All of one length: σ(α) solves Σ (y - p) = 0 over four outcomes and two ties of weight ½.
    assert found["length_controlled"].value == pytest.approx((2.5 + 0.5) / 5)
    assert all(estimate.n == 4 for estimate in found.values())


def test_the_regression_is_the_likeliest_one() -> None:
    """Against a general optimizer on the log-likelihood, written down independently."""
    longer_by = RNG.normal(30, 100, 80)
    wins = RNG.choice([0.0, 0.5, 1.0], 80, p=[0.3, 0.2, 0.5])
    x = np.tanh(longer_by / longer_by.std())

    def loss(theta: np.ndarray) -> float:
        z, ends = theta[0] + theta[1] * x, theta[0] + theta[1] * np.array([-1.0, 1.0])
        own = np.sum(wins * np.log(expit(z)) + (1 - wins) * np.log(expit(-z)))
        return -float(own + np.sum(0.25 * np.log(expit(ends)) + 0.25 * np.log(expit(-ends))))

    best = minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    assert length_controlled(wins, longer_by, np.arange(80)).value == pytest.approx(expit(best.x[0]), abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_one_side_may_always_win(sign: float, shift: float) -> None:
    longer_by = RNG.normal(shift, 100, 50)
    found = length_controlled(np.full(50, 0.5 + sign / 2), longer_by, np.arange(50))
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    assert sign * (found.value - 0.5) > 0.25
    assert found.high - found.low > 0.02  # fifty prompts are no certainty


def test_a_win_by_length_alone_is_none() -> None:
    """The longer one wins with probability σ(3 tanh(d / s)), and the first is the longer one nearly always."""
    longer_by = RNG.normal(100, 100, 5000)
    wins = (RNG.random(5000) < expit(3 * np.tanh(longer_by / longer_by.std()))).astype(float)
    found = length_controlled(wins, longer_by, np.arange(5000))
    assert wins.mean() > 0.75
    assert found.low < 0.5 < found.high < 0.56


def test_copies_of_a_prompt_make_nothing_surer() -> None:
    longer_by, wins = RNG.normal(0, 100, 60), RNG.choice([0.0, 1.0], 60)
    once = length_controlled(wins, longer_by, np.arange(60))
    often = length_controlled(np.repeat(wins, 9), np.repeat(longer_by, 9), np.repeat(np.arange(60), 9))
    apart = length_controlled(np.repeat(wins, 9), np.repeat(longer_by, 9), np.arange(540))
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.05)
    assert often.high - often.low > 2.5 * (apart.high - apart.low)


@pytest.mark.parametrize(("groups", "each", "alpha", "shift"), [(30, 1, 0.5, 0.5), (40, 3, 0.5, 0.5), (100, 1, 1.5, 1)])
def test_the_interval_covers_the_truth(groups: int, each: int, alpha: float, shift: float) -> None:
    repeats, inside, clusters = 600, 0, np.repeat(np.arange(groups), each)
    rng = np.random.default_rng(groups)
    for _ in range(repeats):
        longer_by = rng.normal(shift, 1, len(clusters))
        p = expit(alpha + np.tanh(longer_by / longer_by.std()))
        found = length_controlled((rng.random(len(clusters)) < p).astype(float), longer_by, clusters)
        inside += found.low <= expit(alpha) <= found.high
    room = 3 * math.sqrt(0.95 * 0.05 / repeats)
    assert 0.93 - room < inside / repeats < min(0.97 + room, 0.996)

"""Agreement of raters against published and hand-worked figures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.evaluation.statistics import Estimate
from rlhf.serving.store.raters import grade, krippendorff_alpha, raters

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", C and D: four observers, twelve units.
PUBLISHED = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]


def value(units: Sequence[Sequence[float]]) -> float:
    found = krippendorff_alpha(units)
    assert found
    return found.value


def test_alpha_is_the_published_one() -> None:
    columns = zip(*(row.split() for row in PUBLISHED), strict=True)
    units = [[int(value) for value in column if value != "."] for column in columns]
    assert value(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_two_values_by_hand() -> None:
    """Units (1, 1), (1, 2), (2, 2): n = 3, 3 of 6 values. Observed disagreement 2/6, expected 2 · 3 · 3 / (6 · 5)."""
    assert value([[1, 1], [1, 2], [2, 2]]) == pytest.approx(1 - (2 / 6) / (18 / 30))


def test_alpha_of_what_cannot_disagree() -> None:
    assert value([[1, 1], [4, 4, 4]]) == 1
    assert krippendorff_alpha([[1], [2], []]) is None
    assert krippendorff_alpha([[3, 3], [3, 3]]) is None


def pairwise_alpha(units: Sequence[Sequence[float]]) -> float:
    """By its definition: mean distance within units over the mean distance of any two values."""
    units = [unit for unit in units if len(unit) > 1]
    pooled = [one for unit in units for one in unit]

    @cache
    def distance(a: float, b: float) -> float:
        low, high = min(a, b), max(a, b)
        ends = (pooled.count(low) + pooled.count(high)) / 2
        return (sum(low <= one <= high for one in pooled) - ends) ** 2 if a != b else 0.0

    within = sum(sum(distance(a, b) for a, b in permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    total = sum(distance(a, b) for a, b in permutations(pooled, 2)) / (len(pooled) - 1)
    return 1 - within / total


def votes_of(rng: random.Random, units: int) -> list[list[int]]:
    """Two people who see the same quality, each with an error of their own."""
    qualities = [rng.gauss(0, 1) for _ in range(units)]
    return [[round(max(-2, min(2, quality + rng.gauss(0, 0.7)))) for _ in "ab"] for quality in qualities]


def test_the_interval_of_alpha_is_that_of_drawn_units() -> None:
    rng = random.Random(0)
    units = votes_of(rng, 60)
    drawn = sorted(pairwise_alpha(rng.choices(units, k=60)) for _ in range(200))
    found = krippendorff_alpha(units)
    assert found and found.n == 60
    assert found.value == pytest.approx(pairwise_alpha(units))
    assert found.low == pytest.approx(drawn[5], abs=0.05)
    assert found.high == pytest.approx(drawn[-6], abs=0.05)


def test_the_interval_of_alpha_covers_the_truth() -> None:
    rng = random.Random(1)
    truth = value(votes_of(rng, 50_000))
    found = [krippendorff_alpha(votes_of(rng, 60)) for _ in range(300)]
    assert 0.91 < sum(each is not None and each.low <= truth <= each.high for each in found) / 300 < 0.985


def vote(number: int, first: str, second: str | None, chosen: str | None, rating: str | None, user: str | None) -> Any:
    return SimpleNamespace(id=number, first=first, second=second, chosen=chosen, rating=rating, user=user)


EXCHANGES = {
    name: SimpleNamespace(messages=[{"role": "user", "content": name[0]}])
    for name in ("a1", "a2", "b1", "b2", "c1", "c2")
}


def test_a_grade_does_not_depend_on_the_order_of_showing() -> None:
    assert grade(vote(1, "a1", "a2", "first", "better", None)) == 3
    assert grade(vote(1, "a2", "a1", "second", "better", None)) == 3
    assert grade(vote(1, "a1", "a2", "second", "significantly", None)) == -4
    assert grade(vote(1, "a2", "a1", "first", "negligibly", None)) == -1


def test_votes_by_hand() -> None:
    votes = [
        vote(1, "a1", "a2", "second", "better", "ann"),  # voted again
        vote(2, "a2", "a1", "second", "better", "ann"),
        vote(3, "a1", "a2", "first", "better", "bob"),
        vote(4, "b1", "b2", "first", "slightly", "ann"),
        vote(5, "b2", "b1", "second", "slightly", "bob"),
        vote(6, "c1", "c2", "first", "slightly", None),
        vote(7, "c1", None, None, None, "cid"),
    ]
    values = {"a1": 1.0, "a2": 0.0, "b1": 2.0, "b2": 2.0, "c1": 0.0, "c2": 5.0}
    scores = [SimpleNamespace(name="helpful", exchange_id=key, value=value) for key, value in values.items()]
    found = raters(votes, EXCHANGES, scores)
    assert (found.votes, found.raters) == (5, 2)
    assert found.alpha == Estimate(1.0, 1.0, 1.0, 2)
    assert found.first_chosen and found.first_chosen.value == pytest.approx(3 / 5)
    assert found.reward_agrees["helpful"].value == pytest.approx((1 + 1 + 0.5 + 0.5 + 0) / 5)


def test_no_votes_are_no_report() -> None:
    assert raters([], {}, []) == (0, 0, None, None, {})

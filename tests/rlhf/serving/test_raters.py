"""Agreement of raters against published and hand-worked figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.serving.store.raters import grade, krippendorff_alpha, raters

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", C and D: four observers, twelve units.
PUBLISHED = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]


def test_alpha_is_the_published_one() -> None:
    columns = zip(*(row.split() for row in PUBLISHED), strict=True)
    units = [[int(value) for value in column if value != "."] for column in columns]
    assert krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_of_two_values_by_hand() -> None:
    """Units (1, 1), (1, 2), (2, 2): n = 3, 3 of 6 values. Observed disagreement 2/6, expected 2 · 3 · 3 / (6 · 5)."""
    assert krippendorff_alpha([[1, 1], [1, 2], [2, 2]]) == pytest.approx(1 - (2 / 6) / (18 / 30))


def test_alpha_of_what_cannot_disagree() -> None:
    assert krippendorff_alpha([[1, 1], [4, 4, 4]]) == 1
    assert krippendorff_alpha([[1], [2], []]) is None
    assert krippendorff_alpha([[3, 3], [3, 3]]) is None


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
    assert (found.votes, found.raters, found.alpha) == (5, 2, 1.0)
    assert found.first_chosen and found.first_chosen.value == pytest.approx(3 / 5)
    assert found.reward_agrees["helpful"].value == pytest.approx((1 + 1 + 0.5 + 0.5 + 0) / 5)


def test_no_votes_are_no_report() -> None:
    assert raters([], {}, []) == (0, 0, None, None, {})

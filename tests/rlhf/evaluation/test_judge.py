"""Verdicts of a judge: read from its text, and counted by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from reward_data import Message
from rlhf.evaluation.judge import Judged, judge_preference, question, verdict


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A is right. [[A]]", "A"),
        ("[[B]]", "B"),
        ("Neither. [[C]]", "C"),
        ("First I thought [[A]], and still do: [[A]]", "A"),
        ("[[A]] or [[B]]", None),
        ("A", None),
        ("[[D]]", None),
        ("[A]", None),
        ("[[a]]", None),
        ("", None),
    ],
)
def test_a_verdict_has_one_form(text: str, found: str | None) -> None:
    assert verdict(text) == found


def test_the_judge_sees_all_turns_and_the_responses_in_order() -> None:
    prompt = [Message("user", "one"), Message("assistant", "two"), Message("user", "three {a}")]
    system, user = question(prompt, "right", "wrong {b}")
    assert system["role"] == "system" and "[[C]]" in system["content"]
    places = [
        user["content"].index(text)
        for text in ("one", "two", "three {a}", "response A", "right", "response B", "wrong {b}")
    ]
    assert places == sorted(places)


def test_worked_by_hand() -> None:
    """Seven prompts: a win, a loss, a tie by both; A twice, B twice (both ties by position); a tie and a win; two ties."""
    judged = [
        Judged("A", "B"),
        Judged("B", "A"),
        Judged("C", "C"),
        Judged("A", "A"),
        Judged("B", "B"),
        Judged("C", "B"),
        Judged("A", "B"),
    ]
    found = judge_preference(judged, (np.full(7, 5.0), np.full(7, 5.0)), np.arange(7))
    assert found["win_rate"].value == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.5 + 0.5 + 1) / 7)
    assert found["ties"].value == pytest.approx(4 / 7)
    assert found["orders_agree"].value == pytest.approx(4 / 7)
    assert found["first_shown"].value == pytest.approx(5 / 11)  # A B, B A, A A, B B, B, A B
    assert found["first_shown"].n == 11
    assert "difference" not in found


def test_a_judge_that_reads_nothing_prefers_no_policy() -> None:
    found = judge_preference([Judged("A", "A")] * 9, (np.arange(9.0), np.zeros(9)), np.arange(9))
    assert (found["win_rate"].value, found["ties"].value, found["orders_agree"].value) == (0.5, 1.0, 0.0)
    assert found["first_shown"].value == 1.0 and found["first_shown"].low > 0.6
    undecided = judge_preference([Judged("C", "C")] * 3, (np.zeros(3), np.zeros(3)), np.arange(3))
    assert "first_shown" not in undecided


def test_the_intervals_cover_the_truth() -> None:
    """A judge that chooses by quality, or with probability .3 by position, on prompts that come up to three times."""
    rng, inside = np.random.default_rng(8), {"win_rate": 0, "first_shown": 0}
    by_position, better = 0.3, 0.6
    # The better response is A in one order, whatever decides; in the other it needs a verdict by quality. A verdict by
    # quality is A in one of two orders.
    truth = {
        "win_rate": (1 - by_position) * better + by_position / 2,
        "first_shown": by_position + (1 - by_position) / 2,
    }
    repeats = 400

    def draw(by_quality: Judged) -> Judged:
        first, second = (rng.random() < by_position for _ in by_quality)
        return Judged("A" if first else by_quality.as_a, "A" if second else by_quality.as_b)

    for _ in range(repeats):
        clusters = np.repeat(np.arange(40), rng.integers(1, 4, 40))
        wins_N = (rng.random(40) < better)[clusters]  # equal for equal prompts
        judged = [draw(Judged("A", "B") if wins else Judged("B", "A")) for wins in wins_N]
        found = judge_preference(judged, (np.zeros(len(wins_N)), np.zeros(len(wins_N))), clusters)
        for name, value in truth.items():
            inside[name] += found[name].low <= value <= found[name].high
    assert 0.92 <= inside["win_rate"] / repeats <= 0.98
    assert (
        inside["first_shown"] / repeats >= 0.92
    )  # more: the two verdicts on a prompt differ more than independent ones

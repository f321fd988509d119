"""RewardBench's and RewardBench 2's scores, worked by hand from their papers' formulas."""

from __future__ import annotations

import math

import pytest

from rlhf.evaluation.pairs import pairs_of
from rlhf.evaluation.reward_bench import credit, reward_bench, reward_bench_2, ties_score


def pair(subset: str, margin: float, n: int) -> dict:
    facts = {"row": n, "prompt": f"{n:x}", "form": "pair", "lengths": [3, 4], "turns": 1, "rating": "unrated"}
    return {**facts, "tag": "helpful", "file": "f", "subset": subset, "scores": [margin, 0.0]}


def test_sections_weigh_their_subsets() -> None:
    outcomes = {"math-prm": [1, 1, -1, -1], "hep-cpp": [1], "mt-bench-hard": [1, -1], "llmbar-natural": [1, 0]}
    lines = [pair(subset, float(margin), 0) for subset, found in outcomes.items() for margin in found]
    found = reward_bench(pairs_of({**line, "row": n, "prompt": f"{n:x}"} for n, line in enumerate(lines)))
    assert found["subsets"]["math-prm"].value == 0.5
    assert found["sections"] == {
        "Chat Hard": pytest.approx((37 * 0.5 + 100 * 0.75) / 137),
        "Reasoning": pytest.approx((984 * 0.5 + 164 * 1.0) / 1148),
    }
    assert found["score"] == pytest.approx(((37 * 0.5 + 75) / 137 + (492 + 164) / 1148) / 2)


def test_subsets_of_others_have_no_sections() -> None:
    found = reward_bench(pairs_of([pair("mine", 1.0, 0), pair("mine", -1.0, 1)]))
    assert list(found) == ["subsets"] and found["subsets"]["mine"].value == 0.5
    assert reward_bench(pairs_of([pair("", 1.0, 0)])) == {}


@pytest.mark.parametrize(
    ("scores", "expected"), [([3, 1, 2, 0], 1.0), ([1, 3, 2, 0], 0.0), ([2, 2, 1, 0], 0.5), ([0, 0, 0, 0], 0.25)]
)
def test_one_right_response_of_four(scores: list[float], expected: float) -> None:
    assert credit(scores, 1) == expected


TIED = [
    # right within ½ of one another, the wrong one 2 below: gap 2 > ½; its reference has a gap of 1
    {"name": "tied:1", "scores": [5.0, 4.5, 2.5], "correct": 2},
    {"name": "ref:1", "scores": [2.0, 1.0], "correct": 1},
    # right responses 3 apart and only 1 above the wrong one; the reference is wrong
    {"name": "tied:2", "scores": [5.0, 2.0, 1.0], "correct": 2},
    {"name": "ref:2", "scores": [1.0, 2.0], "correct": 1},
]


def test_ties_by_hand() -> None:
    margin = (math.tanh(1 / 0.5 - 1) + math.tanh(-1 / 3 - 1)) / 2
    expected = 0.3 * 1.0 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margin
    assert ties_score(TIED) == pytest.approx(expected)


def test_the_score_of_reward_bench_2_is_the_mean_of_its_subsets() -> None:
    lines = [{**line, "form": "best_of", "subset": "Ties", "prompt": "t"} for line in TIED]
    lines += [
        {"form": "best_of", "subset": "Math", "scores": [1, 0, 0, 0], "correct": 1, "prompt": "a"},
        {"form": "best_of", "subset": "Math", "scores": [0, 0, 1, 0], "correct": 1, "prompt": "b"},
    ]
    found = reward_bench_2(lines)
    assert found["subsets"]["Math"].value == 0.5
    assert found["score"] == pytest.approx((0.5 + ties_score(TIED)) / 2)
    assert reward_bench_2([]) == {}

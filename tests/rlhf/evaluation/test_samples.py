"""Best of n, diversity and refusals: subsets enumerated, sacrebleu's values, and by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from reward_data import Message, Prompt
from rlhf.evaluation.best_of_n import best_of_n
from rlhf.evaluation.diversity import bleu, diversity
from rlhf.evaluation.refusals import PATTERN, matches, refusal_rates


@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(ties: bool) -> None:
    rng = np.random.default_rng(0)
    selecting = rng.integers(0, 3, (4, 6)).astype(float) if ties else rng.normal(size=(4, 6))
    valued = rng.normal(size=(4, 6))
    curve = best_of_n(selecting, valued, np.arange(4))
    assert [point["size"] for point in curve] == [1, 2, 4, 6]
    for point in curve:
        expected = []
        for s, v in zip(selecting, valued, strict=True):
            for subset in combinations(range(6), point["size"]):
                best = [i for i in subset if s[i] == max(s[j] for j in subset)]
                expected.append(np.mean(v[best]))
        if not ties:
            assert point["score"].value == pytest.approx(np.mean(expected))
    own = best_of_n(selecting, selecting, np.arange(4))
    assert own[-1]["score"].value == pytest.approx(selecting.max(1).mean())
    pairs = [max(s[i], s[j]) for s in selecting for i, j in combinations(range(6), 2)]
    assert own[1]["score"].value == pytest.approx(np.mean(pairs))
    assert own[0]["score"].value == pytest.approx(selecting.mean())


@pytest.mark.parametrize(
    ("sentence", "references", "expected"),  # sacrebleu 2.6: sentence_score, effective order, exp, no tokenisation
    [
        ("the cat sat on the mat", ["the cat is on the mat", "a cat sat there"], 0.42728700639623396),
        ("yes", ["yes it is", "no"], 1.0),
        ("a b c d e", ["e d c b a"], 0.1597357760615681),
        ("one two three four five six", ["one two three four"], 0.508132748154615),
        ("a b", ["a b c d e f"], 0.13533528323661276),
        ("x", ["y"], 0.0),
    ],
)
def test_bleu_is_that_of_sacrebleu(sentence: str, references: list[str], expected: float) -> None:
    assert bleu(sentence.split(), [one.split() for one in references]) == pytest.approx(expected)


def test_diversity_by_hand() -> None:
    found = diversity([["a b a", "a b"], ["c"]], ["p", "q"])
    assert found["distinct_1"].value == pytest.approx((2 / 5 + 1) / 2)
    assert found["distinct_2"].value == pytest.approx(2 / 3)
    assert found["self_bleu"].n == 1
    assert diversity([["same words here now"] * 3], ["p"])["self_bleu"].value == pytest.approx(1)


def test_refusals_by_group() -> None:
    rows = [
        ("safety", {}),
        ("safety", {}),
        ("helpful", {"look_alike": True}),
        ("helpful", {"label": "safe"}),
        ("helpful", {}),
    ]
    prompts = [
        Prompt((Message("user", str(n)),), tag, f"x:{n}", columns)  # type: ignore[arg-type]
        for n, (tag, columns) in enumerate(rows)
    ]
    found = refusal_rates([True, False, True, False, False], prompts)
    assert {name: (one.value, one.n) for name, one in found.items()} == {
        "unsafe": (0.5, 2),
        "look_alike": (0.5, 2),
        "harmless": (0.0, 1),
    }


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but no.", True),
        ("i am sorry, but that would hurt someone.", True),
        ("I can’t help with that.", True),
        ("no, i will not do that.", True),
        ("As a model I cannot do this", True),
        ("As an AI, no.", True),
        ("Sorry! Another time.", True),
        ("That is not allowed here.", True),
        ("I could not do that to anyone.", True),
        ("Sure, here it is.", False),
        ("Sure! Here is how you cannot miss it.", False),
        ("No, the earth is not flat.", False),
        ("There is no way to know that.", False),
        ("He was sorry.", False),
        ("x" * 300 + " I cannot", False),
        ("", False),
    ],
)
def test_how_refusals_begin(text: str, refusal: bool) -> None:
    assert matches(PATTERN, [text]) == [refusal]

"""The gate, on responses whose differences are known by construction."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import t as student

from rlhf.evaluation.gate import Responses, decide

COUNT = 40


def policy(
    score: float = 0.0, safety: float = 0.0, length: int = 20, refused: int = 0, noise: float = 0.1
) -> Responses:
    """Scores that alternate by ± noise around a mean; every fourth prompt is tagged safety, the first others refused."""
    tags = ["safety" if n % 4 == 0 else "helpful" for n in range(COUNT)]
    harmless = [n for n, tag in enumerate(tags) if tag == "helpful"][:refused]
    texts = [("Sorry, I can't help. " if n in harmless else "").ljust(length, "x") for n in range(COUNT)]

    def scores(mean: float) -> list[float | None]:
        return [mean + (noise if n % 3 else -noise) for n in range(COUNT)]

    return Responses(
        [f"p{n}" for n in range(COUNT)],
        tags,
        texts,
        [*map(len, texts)],
        {"gold": scores(score), "safety": scores(safety)},
    )


def failures(candidate: Responses, champion: Responses, reward: str = "gold") -> list[str]:
    return [check.name for check in decide(candidate, champion, reward) if not check.passed]


def varied(policy: Responses, noise: float) -> Responses:
    """With gold scores that differ from prompt to prompt, by +noise and -noise in turn."""
    scores = [(value or 0.0) + (noise if n % 2 else -noise) for n, value in enumerate(policy.scores["gold"])]
    return replace(policy, scores={**policy.scores, "gold": scores})


@pytest.mark.parametrize(
    ("candidate", "failed"),
    [
        (policy(score=0.5), []),
        (policy(score=0.0), ["reward gold"]),
        (policy(score=-0.5), ["reward gold"]),
        (policy(score=0.5, safety=-0.2), ["guard safety"]),
        (policy(score=0.5, safety=0.2), []),
        (policy(score=0.5, length=25), []),  # 20 · 1.25
        (policy(score=0.5, length=26), ["guard length"]),
        (policy(score=0.5, length=5), []),
        (policy(score=0.5, length=21, refused=12), ["guard refusals"]),
        (
            policy(score=-1.0, safety=-1.0, length=60, refused=30),
            ["reward gold", "guard safety", "guard length", "guard refusals"],
        ),
    ],
)
def test_a_candidate_passes_only_what_it_is_good_at(candidate: Responses, failed: list[str]) -> None:
    assert failures(candidate, policy()) == failed


def test_the_reward_must_rise_beyond_the_interval_of_the_paired_difference() -> None:
    """Differences d ± 1 in turn: standard error 1/√40 · √(40/39), and Student's t of 39 degrees of freedom."""
    half = student.ppf(0.975, COUNT - 1) / math.sqrt(COUNT) * math.sqrt(COUNT / (COUNT - 1))
    below, above = varied(policy(score=float(0.8 * half)), 1.0), varied(policy(score=float(1.25 * half)), 1.0)
    assert failures(below, policy()) == ["reward gold"]
    assert failures(above, policy()) == []
    (check, *_) = decide(above, policy(), "gold")
    assert check.value.value == pytest.approx(1.25 * half)
    assert check.value.high - check.value.value == pytest.approx(half, rel=0.12)  # of 1,000 resamples


def test_responses_to_one_prompt_count_as_one_observation() -> None:
    """A difference of ±1 around a mean of 0.4 is clear over 40 prompts, and nothing over 4."""
    candidate = varied(policy(score=0.4), 1.0)
    assert failures(candidate, policy()) == []
    few = [f"p{n % 2}{n // 20}" for n in range(COUNT)]  # of one sign each
    grouped = [replace(one, prompts=few) for one in (candidate, policy())]
    assert failures(grouped[0], grouped[1]) == ["reward gold"]


def test_safety_is_judged_on_the_prompts_that_are_tagged_so() -> None:
    worse, safe = policy(score=0.5), policy()
    scores = [
        (value or 0.0) - (tag == "helpful") for value, tag in zip(worse.scores["safety"], worse.tags, strict=True)
    ]
    unsafe_elsewhere = replace(worse, scores={**worse.scores, "safety": scores})
    assert failures(unsafe_elsewhere, safe) == []
    untagged = replace(unsafe_elsewhere, tags=["helpful"] * COUNT)
    assert failures(untagged, safe) == ["guard safety"]


def test_a_fall_in_safety_within_its_interval_is_no_reason() -> None:
    candidate = policy(score=0.5)
    scores = [-0.1 + (1.0 if n % 8 else -1.0) for n in range(COUNT)]  # on the ten prompts tagged safety ±1 in turn
    unsure = replace(candidate, scores={**candidate.scores, "safety": scores})
    (_, check, *_) = decide(unsure, policy(), "gold")
    assert check.value.low < check.value.value < 0 < check.value.high and check.passed


def test_refusals_of_unsafe_prompts_are_welcome() -> None:
    candidate = policy(score=0.5, length=22)
    texts = [
        "sorry, i can not do that" if tag == "safety" else text
        for text, tag in zip(candidate.texts, candidate.tags, strict=True)
    ]
    assert failures(replace(candidate, texts=texts), policy()) == []


def test_safety_is_no_guard_beside_itself_and_failed_scores_are_left_out() -> None:
    champion = policy()
    names = [check.name for check in decide(policy(safety=1.0), champion, "safety")]
    assert names == ["reward safety", "guard length", "guard refusals"]
    scores = [None if n < 10 else value for n, value in enumerate(policy(score=1.0).scores["gold"])]
    partly = replace(champion, scores={**champion.scores, "gold": scores})
    assert decide(partly, champion, "gold")[0].value.n == 30
    nothing = replace(champion, scores={"gold": [None] * COUNT})
    with pytest.raises(ValueError, match="gold"):
        decide(nothing, champion, "gold")


def test_of_equal_policies_few_are_promoted() -> None:
    """By chance the interval lies above 0 in one of 40 comparisons; in 400 at most 20 (a probability of 1 in 1,000)."""
    rng, base = np.random.default_rng(3), policy()
    promoted = 0
    for _ in range(400):
        own, other = (replace(base, scores={"gold": rng.normal(size=COUNT).tolist()}) for _ in range(2))
        promoted += not failures(own, other)
    assert 2 <= promoted <= 20

"""The gate of reward models, on pairs whose differences are known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf.evaluation.pairs import Labels, Pairs
from rlhf.evaluation.reward_gate import decide

COUNT = 200
TAG_N = np.arange(COUNT) % 4 == 0  # safety
SHORTER_N = np.arange(COUNT) % 5 == 1  # the chosen response is the shorter one


def scored(margin_N: np.ndarray, prompts_N: np.ndarray | None = None, tag_N: np.ndarray = TAG_N) -> Pairs:
    count = len(margin_N)
    one = Labels(np.zeros(count, dtype=int), ["one"])
    return Pairs(
        rows_N=np.arange(count),
        chosen_N=margin_N + 3.0,
        rejected_N=np.full(count, 3.0),
        chosen_length_N=np.where(np.resize(SHORTER_N, count), 5.0, 10.0),
        rejected_length_N=np.full(count, 7.0),
        prompts_N=np.arange(count) if prompts_N is None else prompts_N,
        turns_N=np.ones(count),
        ratings=one,
        tags=Labels(tag_N.astype(int), ["helpful", "safety"]),
        files=one,
        subsets=one,
    )


def wrong(count: int, group_N: np.ndarray | None = None) -> np.ndarray:
    """Which pairs are ranked wrongly: the first `count` of a group; without one, of all in an order drawn by lot."""
    order = np.random.default_rng(3).permutation(COUNT) if group_N is None else np.flatnonzero(group_N)
    return np.isin(np.arange(COUNT), order[:count])


def model(wrong_N: np.ndarray, size: float | None = None) -> np.ndarray:
    """Margins of ± `size`, by default as sure as the model is right on helpful pairs."""
    right = 1 - wrong_N[~TAG_N].mean()
    return np.where(wrong_N, -1.0, 1.0) * (size or math.log(right / (1 - right)))


def failures(candidate: np.ndarray, champion: np.ndarray, own_tag: str = "helpful") -> list[str]:
    return [check.name for check in decide(scored(candidate), scored(champion), own_tag) if not check.passed]


SAFE_SHORT_N, HELPFUL_SHORT_N = TAG_N & SHORTER_N, ~TAG_N & SHORTER_N


@pytest.mark.parametrize(
    ("candidate", "failed"),
    [
        (model(wrong(20)), []),
        (model(wrong(60)), ["accuracy"]),  # as often right
        (model(wrong(60) | wrong(45, TAG_N)), ["accuracy", "guard tag safety"]),
        (model(wrong(20) | wrong(40, TAG_N)), ["guard tag safety"]),
        (model(wrong(20, HELPFUL_SHORT_N)), ["guard shorter"]),
        (model(wrong(20), size=0.05), ["guard calibration"]),  # nearly always right, and not sure of it
        (model(wrong(5), size=40.0), []),  # sure, and nearly always right
        (model(wrong(45), size=40.0), ["guard calibration"]),  # more often right, and sure where it is wrong
    ],
)
def test_each_loss_is_found(candidate: np.ndarray, failed: list[str]) -> None:
    assert failures(candidate, model(wrong(60))) == failed


def test_the_values_are_those_of_the_pairs_of_the_own_tag() -> None:
    """Every value recounted pair by pair."""
    rng = np.random.default_rng(1)
    own, other = (rng.normal(1.0, 2.0, COUNT) for _ in range(2))
    found = {check.name: check.value for check in decide(scored(own), scored(other), "safety")}

    def accuracy(margins: np.ndarray, mask: np.ndarray) -> float:
        rows = [n for n in range(COUNT) if mask[n]]
        return sum(margins[n] > 0 for n in rows) / len(rows)

    def error(margins: np.ndarray) -> float:
        bins: dict[int, list[float]] = {}
        for n in range(COUNT):
            if TAG_N[n]:
                sure = 1 / (1 + math.exp(-abs(margins[n])))
                bins.setdefault(min(int((sure - 0.5) * 20), 9), []).append(sure - (margins[n] > 0))
        return sum(abs(sum(gaps)) for gaps in bins.values()) / TAG_N.sum()

    expected = {
        "accuracy": accuracy(own, TAG_N) - accuracy(other, TAG_N),
        "guard calibration": error(own) - error(other),
        "guard shorter": accuracy(own, SAFE_SHORT_N) - accuracy(other, SAFE_SHORT_N),
        "guard tag helpful": accuracy(own, ~TAG_N) - accuracy(other, ~TAG_N),
    }
    assert {name: value.value for name, value in found.items()} == pytest.approx(expected)
    assert found["accuracy"].n == TAG_N.sum() and found["guard tag helpful"].n == COUNT - TAG_N.sum()


def test_without_a_pair_of_its_tag_all_pairs_count() -> None:
    untagged = np.zeros(COUNT, dtype=bool)
    checks = decide(scored(model(wrong(20)), tag_N=untagged), scored(model(wrong(60)), tag_N=untagged), "safety")
    assert [check.name for check in checks] == ["accuracy", "guard calibration", "guard shorter"]
    assert checks[0].value.n == COUNT and checks[0].value.value == pytest.approx(0.2)


def test_pairs_of_one_prompt_make_nothing_surer() -> None:
    """Each pair forty times, under its prompt: the values are those of the five pairs, and so is what is known of them."""
    own, other = (np.repeat([1.0, 1.0, 1.0, 1.0, second], COUNT // 5) for second in (1.0, -1.0))
    prompts_N, untagged = np.repeat(np.arange(5), COUNT // 5), np.zeros(COUNT, dtype=bool)
    by_prompt, by_pair = (
        decide(scored(own, prompts, untagged), scored(other, prompts, untagged), "helpful")[0]
        for prompts in (prompts_N, None)
    )
    assert by_prompt.value.value == by_pair.value.value == pytest.approx(0.2)
    assert by_pair.passed and not by_prompt.passed


def test_models_that_are_equally_calibrated_pass_and_overconfidence_is_refused() -> None:
    """By simulation: outcomes are drawn with the probabilities that the calibrated margins say."""
    rng, refused = np.random.default_rng(0), {1.0: 0, 3.0: 0}
    for _ in range(30):
        logits_N = 1.5 * rng.normal(size=1000)
        right_N = np.where(rng.random(1000) < 1 / (1 + np.exp(-logits_N)), 1.0, -1.0)
        noise_N = logits_N * rng.uniform(0.9, 1.1, 1000)
        for scale in refused:
            tags = np.zeros(1000, dtype=bool)
            own = scored(right_N * logits_N * scale, tag_N=tags), scored(right_N * noise_N, tag_N=tags)
            refused[scale] += not decide(*own, "helpful")[1].passed
    assert refused[1.0] <= 1 and refused[3.0] == 30

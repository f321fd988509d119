"""Length bias against numpy's least squares on pairs and their mirror images, and by counting."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.evaluation.length_bias import length_bias
from rlhf.evaluation.pairs import Labels, Pairs
from rlhf.evaluation.reward_accuracy import accuracy, floors


def pairs_with(chosen: list, rejected: list, chosen_lengths: list, rejected_lengths: list) -> Pairs:
    n = len(chosen)
    one = Labels(np.zeros(n, dtype=int), ["x"])
    return Pairs(
        rows_N=np.arange(n),
        chosen_N=np.array(chosen, dtype=float),
        rejected_N=np.array(rejected, dtype=float),
        chosen_length_N=np.array(chosen_lengths),
        rejected_length_N=np.array(rejected_lengths),
        prompts_N=np.arange(n),
        turns_N=np.array([1, 2, 7, 9] + [1] * (n - 4)),
        ratings=one,
        tags=one,
        files=one,
        subsets=one,
    )


PAIRS = pairs_with([2, 0, 1, 1], [1, 1, 0, 1], [9, 3, 4, 5], [3, 9, 8, 5])  # right, wrong, right, tie


def test_where_the_shorter_response_is_better() -> None:
    found = length_bias(PAIRS)
    assert found["chosen_is_longer"].value == 1.5 / 4
    assert found["prefers_longer"].value == pytest.approx(2 / 3)  # the first and the second
    assert (found["longer_chosen"].value, found["longer_chosen"].n) == (1.0, 1)
    assert (found["shorter_chosen"].value, found["shorter_chosen"].n) == (0.5, 2)


def test_floors_and_what_a_model_adds_to_them() -> None:
    found = floors(PAIRS, {"mine": np.array([1.0, 1.0, -1.0, 0.0])})
    assert {name: one.value for name, one in found["floors"].items()} == {
        "longer": 0.375,
        "shorter": 0.625,
        "mine": 0.625,
    }
    assert found["above_floors"]["mine"].value == pytest.approx(2.5 / 4 - 2.5 / 4)
    assert found["above_floors"]["longer"].value == pytest.approx(0.625 - 0.375)


def test_accuracy_by_length_and_turns() -> None:
    found = accuracy(PAIRS)
    by_length = {name: (one.value, one.n) for name, one in found["by_length_gap"].items()}  # type: ignore[union-attr]
    assert by_length == {"under_0.5": (0.0, 1), "0.5_to_0.8": (1.0, 1), "0.8_to_1.25": (0.5, 1), "2_and_more": (1.0, 1)}
    by_turns = {name: (one.value, one.n) for name, one in found["by_turns"].items()}  # type: ignore[union-attr]
    assert by_turns == {"1": (1.0, 1), "2": (0.0, 1), "5_and_more": (0.75, 2)}


def test_correlations_are_those_of_pairs_and_their_mirror_images() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, (2, 80))
    ratio = np.log(lengths[0] / lengths[1])
    margin = 0.7 * ratio + rng.normal(0.4, 1, 80)
    found = length_bias(pairs_with(list(margin), [0] * 80, list(lengths[0]), list(lengths[1])))
    mirrored = [np.concatenate([column, -column]) for column in (margin, ratio, np.ones(80))]
    assert found["correlation"].value == pytest.approx(np.corrcoef(mirrored[0], mirrored[1])[0, 1])
    # partial correlation: of what least squares on the length leaves of either
    left = [y - mirrored[1] * (mirrored[1] @ y) / (mirrored[1] @ mirrored[1]) for y in (mirrored[0], mirrored[2])]
    assert found["partial_correlation"].value == pytest.approx(np.corrcoef(left[0], left[1])[0, 1])


def test_a_model_that_counts_knows_nothing_beyond_length() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 50, (2, 200))
    ratio = list(np.log(lengths[0] / lengths[1]) + rng.normal(0, 0.01, 200))
    found = length_bias(pairs_with(ratio, [0] * 200, list(lengths[0]), list(lengths[1])))
    assert found["correlation"].value > 0.99
    assert found["partial_correlation"].low < 0 < found["partial_correlation"].high

"""Every estimator against plain loops over the rows of a group, in numpy and float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.advantages import ADVANTAGES, Estimator, Signals, estimate
from rlhf.config import PPOConfig
from rlhf.config.ppo import GROUPED

R = 4
GAMMA, LAMBDA = 0.5, 0.75


@dataclass
class Row:
    rewards: list[float]  # of its real tokens
    values: list[float]
    group: int
    counted: bool


quarters = st.integers(-8, 8).map(lambda n: n / 4)
rows = st.lists(
    st.builds(
        lambda tokens, group, counted: Row([r for r, _ in tokens], [v for _, v in tokens], group, counted),
        st.lists(st.tuples(quarters, quarters), min_size=1, max_size=R),
        st.integers(0, 3),
        st.sampled_from([True, True, True, False]),
    ),
    min_size=1,
    max_size=9,
)


# --- the definitions --------------------------------------------------------------------------------------------------


def group_of(rows: list[Row], row: Row) -> list[float]:
    """Rewards of the responses to the same prompt that have a score."""
    return [sum(other.rewards) for other in rows if other.group == row.group and other.counted]


def grpo(rows: list[Row], row: Row) -> list[float]:
    of_group = group_of(rows, row)
    return [float((sum(row.rewards) - np.mean(of_group)) / (np.std(of_group, ddof=1) + 1e-4))] * len(row.rewards)


def dr_grpo(rows: list[Row], row: Row) -> list[float]:
    return [sum(row.rewards) - float(np.mean(group_of(rows, row)))] * len(row.rewards)


def rloo(rows: list[Row], row: Row) -> list[float]:
    others = [sum(o.rewards) for o in rows if o.group == row.group and o.counted and o is not row]
    return [sum(row.rewards) - float(np.mean(others))] * len(row.rewards)


def to_go(rows: list[Row], row: Row) -> list[float]:
    return [sum(r * GAMMA**k for k, r in enumerate(row.rewards[t:])) for t in range(len(row.rewards))]


def gae(rows: list[Row], row: Row) -> list[float]:
    values = [*row.values, 0.0]
    deltas = [r + GAMMA * values[t + 1] - values[t] for t, r in enumerate(row.rewards)]
    return [sum(d * (GAMMA * LAMBDA) ** k for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


DEFINITIONS = {"gae": gae, "grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce++": to_go}
COMPARING = ("grpo", "dr_grpo", "rloo")


def expected(name: str, rows: list[Row]) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and the critic's targets of each row's real tokens."""
    found = []
    for row in rows:
        alone = name in COMPARING and len(group_of(rows, row)) < 2
        found.append(DEFINITIONS[name](rows, row) if row.counted and not alone else [0.0] * len(row.rewards))
    targets = [
        [a + v if row.counted else 0.0 for a, v in zip(own, row.values, strict=True)]
        for own, row in zip(found, rows, strict=True)
    ]
    every = [a for own, row in zip(found, rows, strict=True) for a in own if row.counted]
    if name in ("gae", "reinforce++") and every:
        mean, var = np.mean(every), np.var(every)
        scale = np.sqrt(var) if var > 1e-8 else 1.0
        found = [
            [float((a - mean) / scale) if row.counted else 0.0 for a in own]
            for own, row in zip(found, rows, strict=True)
        ]
    return found, targets


# --- what the code is given -------------------------------------------------------------------------------------------


def signals(rows: list[Row], garbage: float = 0.0) -> Signals:
    """The rows, with garbage in masked slots of the values and all over the rows that do not count."""
    rewards_BR, values_BR = torch.zeros(len(rows), R), torch.full((len(rows), R), garbage)
    mask_BR = torch.zeros(len(rows), R, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.rewards)
        mask_BR[i, :n] = True
        rewards_BR[i, :n] = torch.tensor(row.rewards) if row.counted else garbage
        values_BR[i, :n] = torch.tensor(row.values) if row.counted else garbage
    group_B, counted_B = torch.tensor([row.group for row in rows]), torch.tensor([row.counted for row in rows])
    return Signals(rewards_BR, values_BR, mask_BR, group_B, counted_B)


@pytest.mark.parametrize("name", ADVANTAGES)
@given(rows=rows, garbage=st.sampled_from([0.0, float("nan"), float("inf"), -1e9]))
def test_agrees_with_its_definition_and_ignores_what_does_not_count(name: str, rows: list[Row], garbage: float):
    given = signals(rows, garbage)
    got, want = estimate(ADVANTAGES[name], given, GAMMA, LAMBDA), expected(name, rows)
    for got_BR, wanted in zip(got, want, strict=True):
        assert got_BR.dtype == torch.float32
        for i, row in enumerate(rows):
            assert got_BR[i, : len(row.rewards)].tolist() == pytest.approx(wanted[i], rel=1e-4, abs=1e-4)
        assert not got_BR[~given.mask_BR].any() and not got_BR[~given.counted_B].any()


def scored(*scores: float | None) -> list[Row]:
    """One group; a row's score stands at its last token. None: it failed."""
    return [Row([0.0] * i + [s or 0.0], [0.0] * (i + 1), 0, s is not None) for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        # mean 2, deviation √((1 + 1 + 0) / 2) = 1
        ("grpo", [-1 / 1.0001, 1 / 1.0001, 0.0, 0.0]),
        ("dr_grpo", [-1.0, 1.0, 0.0, 0.0]),
        # less the mean of the two others: 1 - 2.5, 3 - 1.5, 2 - 2
        ("rloo", [-1.5, 1.5, 0.0, 0.0]),
    ],
)
def test_a_group_with_a_failed_row_by_hand(name: str, by_hand: list[float]):
    given = signals(scored(1.0, 3.0, 2.0, None))
    got_BR, _ = estimate(ADVANTAGES[name], given, 1.0, 1.0)
    for i, wanted in enumerate(by_hand):
        assert got_BR[i].tolist() == pytest.approx([wanted] * (i + 1) + [0.0] * (R - i - 1), abs=1e-6)


@pytest.mark.parametrize("name", COMPARING)
def test_a_group_of_which_one_row_is_left_teaches_nothing(name: str):
    got_BR, _ = estimate(ADVANTAGES[name], signals(scored(5.0, None, None)), 1.0, 1.0)
    assert not got_BR.any()


@pytest.mark.parametrize("name", ADVANTAGES)
@given(rows=rows)
def test_the_order_of_rows_changes_only_their_order(name: str, rows: list[Row]):
    forth, _ = estimate(ADVANTAGES[name], signals(rows), GAMMA, LAMBDA)
    back, _ = estimate(ADVANTAGES[name], signals(rows[::-1]), GAMMA, LAMBDA)
    torch.testing.assert_close(back.flip(0), forth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda given, *_: given.rewards_BR.sum(1), r"shape \(4,\), not \[B, R\] = \(4, 4\)"),
        (lambda given, *_: given.rewards_BR / 0, "not finite"),
    ],
)
def test_what_an_estimator_gives_must_be_a_finite_number_for_each_token(wrong: Any, message: str):
    """A row of B numbers would be spread over the tokens where B = R."""
    square = signals(scored(1.0, 2.0, 3.0, 4.0))
    assert square.rewards_BR.shape == (4, 4)
    with pytest.raises(ValueError, match=message):
        estimate(Estimator(wrong), square, 1.0, 1.0)


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gae", {"critic": True, "whiten_rewards": True, "whiten_advantages": True, "missing_eos_penalty": 1.0}),
        ("grpo", {"min_group_size": 2, "kl": "loss", "loss_mean": "response"}),
        ("dr_grpo", {"min_group_size": 2, "kl": "loss", "loss_mean": "constant"}),
        ("rloo", {"min_group_size": 2}),
        ("reinforce++", {"whiten_advantages": True}),
    ],
)
def test_each_asks_for_what_its_paper_has(name: str, published: dict[str, Any]):
    plain = {"critic": False, "min_group_size": 1, "kl": "reward", "loss_mean": "token"}
    plain |= {"whiten_rewards": False, "whiten_advantages": False, "missing_eos_penalty": 0.0}
    asked = {key: value for key, value in vars(ADVANTAGES[name]).items() if key != "advantages"}
    assert asked == plain | published


def test_the_settings_know_the_estimators_without_torch():
    named, _ = get_args(PPOConfig.model_fields["advantage"].annotation)
    assert tuple(ADVANTAGES) == get_args(named)
    assert tuple(name for name, estimator in ADVANTAGES.items() if estimator.min_group_size > 1) == GROUPED

"""Advantages against numbers worked by hand, and against the defining sum in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.advantages import gae

numbers = st.floats(-10, 10, width=32)
rows = st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=12)
shares = st.floats(0, 1)

REWARDS = torch.tensor([[1.0, 0.0, 2.0]])
VALUES = torch.tensor([[0.5, 1.0, 1.5]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def defining_sum(rewards, values, gamma, gae_lambda):
    """A_t = Σ_l (γλ)^l δ_{t+l}, without recursion."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * gae_lambda) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def test_by_hand():
    # δ = 1 + .5·1 - .5 = 1,  0 + .5·1.5 - 1 = -.25,  2 - 1.5 = .5;  γλ = .25
    advantages, returns = gae(REWARDS, VALUES, ALL, gamma=0.5, gae_lambda=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.96875, -0.125, 0.5]]))
    torch.testing.assert_close(returns, torch.tensor([[1.46875, 0.875, 2.0]]))


def test_without_discount_returns_are_rewards_to_go():
    _, returns = gae(REWARDS, VALUES, ALL, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.tensor([[3.0, 2.0, 2.0]]))


@given(rows, shares, shares)
def test_agrees_with_the_defining_sum_over_real_tokens(row, gamma, gae_lambda):
    rewards, values, mask = (torch.tensor([list(column)]) for column in zip(*row, strict=True))
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    real = [(r, v) for r, v, is_real in row if is_real]
    expected = defining_sum([r for r, _ in real], [v for _, v in real], gamma, gae_lambda)
    assert advantages[mask].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert returns[mask].tolist() == pytest.approx([a + v for a, (_, v) in zip(expected, real, strict=True)], abs=1e-3)
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_a_masked_gap_changes_nothing():
    with_gap = torch.tensor([True, False, False, True, True])
    advantages, returns = gae(REWARDS, VALUES, ALL, 0.9, 0.8)
    wide_advantages, wide_returns = gae(
        torch.tensor([[1.0, 50.0, 50.0, 0.0, 2.0]]), torch.tensor([[0.5, 7.0, 7.0, 1.0, 1.5]]), with_gap[None], 0.9, 0.8
    )
    torch.testing.assert_close(wide_advantages[:, with_gap], advantages, rtol=0, atol=0)
    torch.testing.assert_close(wide_returns[:, with_gap], returns, rtol=0, atol=0)


def test_masked_slots_do_not_reach_the_result(poison):
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])

    def run(filler):
        return gae(torch.where(mask, 1.0, filler), torch.where(mask, 0.5, filler), mask, 1.0, 0.95)

    for clean, poisoned in zip(run(0.0), run(poison), strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


def test_rows_do_not_see_each_other():
    rewards, values, mask = (torch.cat([x, x.flip(1)]) for x in (REWARDS, VALUES, ALL))
    both, _ = gae(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(both[:1], gae(REWARDS, VALUES, ALL, 0.9, 0.8)[0], rtol=0, atol=0)


def test_half_precision_values_are_computed_in_float32():
    advantages, returns = gae(REWARDS.bfloat16(), VALUES.bfloat16(), ALL, 1.0, 0.95)
    assert advantages.dtype == returns.dtype == torch.float32

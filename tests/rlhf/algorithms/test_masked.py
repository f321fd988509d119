"""Sums and whitening over real tokens, against the statistics module and numbers worked by hand."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.masked import keep, masked_mean_and_var, masked_sum, whiten

X = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])

numbers = st.floats(-100, 100, width=32)
entries = st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=20)


def whitened(x, mask, shift_mean):
    return whiten(x, *masked_mean_and_var(x, mask), mask, shift_mean)


def test_sum_counts_real_entries_alone():
    assert masked_sum(X, MASK) == 6.0


def test_an_integer_mask_counts_like_a_boolean_one():
    assert masked_sum(X, MASK.long()) == 6.0


def test_mean_and_biased_variance_by_hand():
    mean, var = masked_mean_and_var(X, MASK)  # of 1, 2, 3
    assert mean == 2.0
    torch.testing.assert_close(var, torch.tensor(2 / 3))


@given(entries)
def test_mean_and_variance_agree_with_the_statistics_module(entries):
    x, mask = (torch.tensor(column) for column in zip(*entries, strict=True))
    mean, var = masked_mean_and_var(x, mask)
    real = [number for number, is_real in entries if is_real] or [0.0]
    assert mean.item() == pytest.approx(statistics.fmean(real), abs=1e-3)
    assert var.item() == pytest.approx(statistics.pvariance(real), rel=1e-4, abs=1e-3)


def test_shifted_whitening_by_hand():
    result = whitened(X, MASK, shift_mean=True)  # (1, 2, 3) - 2, over sqrt(2/3)
    step = math.sqrt(1.5)
    torch.testing.assert_close(result, torch.tensor([[-step, 0.0, 0.0], [step, 0.0, 0.0]]))


def test_unshifted_whitening_only_divides():
    result = whitened(X, MASK, shift_mean=False)
    step = math.sqrt(1.5)
    torch.testing.assert_close(result, torch.tensor([[step, 2 * step, 0.0], [3 * step, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("real", "shifted", "unshifted"),
    [
        ([], [], []),
        ([5.0], [0.0], [5.0]),
        ([5.0, 5.0], [0.0, 0.0], [5.0, 5.0]),
        ([4.0, 8.0], [-1.0, 1.0], [2.0, 4.0]),
    ],
    ids=["no token", "one token", "two equal tokens", "two tokens"],
)
def test_whitening_of_few_tokens(real, shifted, unshifted):
    x = torch.tensor([*real, 7.0])
    mask = torch.tensor([True] * len(real) + [False])
    torch.testing.assert_close(whitened(x, mask, True), torch.tensor([*shifted, 0.0]))
    torch.testing.assert_close(whitened(x, mask, False), torch.tensor([*unshifted, 0.0]))


def test_rounding_errors_of_equal_values_are_not_blown_up_to_a_spread():
    x = torch.full((1001,), 0.1)
    assert whitened(x, torch.ones_like(x), shift_mean=True).abs().max() < 1e-4


@given(entries)
def test_whitened_values_have_mean_0_and_variance_1(entries):
    x, mask = (torch.tensor(column) for column in zip(*entries, strict=True))
    real = [number for number, is_real in entries if is_real]
    if not real or statistics.pvariance(real) < 1e-2:
        return
    result = whitened(x, mask, shift_mean=True)[mask].tolist()
    assert statistics.fmean(result) == pytest.approx(0.0, abs=1e-2)
    assert statistics.pvariance(result) == pytest.approx(1.0, rel=1e-3)


def test_padding_changes_nothing():
    longer, longer_mask = torch.nn.functional.pad(X, (0, 5)), torch.nn.functional.pad(MASK, (0, 5))
    torch.testing.assert_close(whitened(longer, longer_mask, True)[:, :3], whitened(X, MASK, True), rtol=0, atol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_slots_reach_neither_the_whitened_values_nor_their_gradient(poison, shift_mean):
    def run(filler):
        x = torch.where(MASK, X, filler).requires_grad_()
        result = whitened(x, MASK, shift_mean)
        (result * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
        return result, x.grad

    for clean, poisoned in zip(run(0.0), run(poison), strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


def test_the_sum_of_nothing_is_attached_to_the_graph():
    x = X.clone().requires_grad_()
    masked_sum(x, torch.zeros_like(MASK)).backward()
    assert x.grad is not None and x.grad.eq(0).all()


def test_keep_gives_float32():
    assert keep(X.bfloat16(), MASK).dtype == torch.float32

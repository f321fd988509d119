"""Random numbers against whole-number arithmetic, picked tokens against a plain loop and a chi-square test."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.generation import counter_rng, keyed_uniform, pick_token


def splitmix64(x):
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


integers = st.integers(-(2**62), 2**62)


@given(integers, st.integers(0, 2**40), st.lists(integers, min_size=1, max_size=4), st.integers(0, 10_000))
def test_keyed_numbers_are_those_of_whole_number_arithmetic(seed, iteration, ids, position):
    got = keyed_uniform(seed, iteration, torch.tensor(ids), position).tolist()
    for number, row in zip(got, ids, strict=True):
        x = splitmix64(seed % 2**64)
        for key in (iteration, row % 2**64, position):
            x = splitmix64(x ^ key)
        assert number == (x >> 40) / 2**24
        assert 0 <= number < 1


def test_keyed_numbers_of_neighbouring_keys_are_not_correlated():
    ids = torch.arange(4096)
    keys = [(seed, iteration, position) for seed in (0, 1) for iteration in (0, 1, 2) for position in range(6)]
    numbers_KN = torch.stack([keyed_uniform(seed, iteration, ids, position) for seed, iteration, position in keys])
    correlation_KK = torch.corrcoef(numbers_KN) - torch.eye(len(keys))
    along_ids = torch.corrcoef(torch.stack([numbers_KN[0, :-1], numbers_KN[0, 1:]]))[0, 1]
    limit = 4.5 / math.sqrt(len(ids))  # of 630 pairs none is expected beyond 4.5 standard deviations
    assert correlation_KK.abs().max() < limit
    assert along_ids.abs() < limit
    assert (numbers_KN.mean(1) - 0.5).abs().max() < 4.5 / math.sqrt(12 * len(ids))


def test_tokens_follow_the_softmax():
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 1.5, 0.0])
    N, counts = 40_000, torch.zeros(8)
    for position in (0, 5):
        tokens = pick_token(torch.softmax(logits_V, -1).expand(N, 8), keyed_uniform(3, 1, torch.arange(N), position))
        counts += torch.bincount(tokens, minlength=8)
    expected = 2 * N * torch.softmax(logits_V.double(), -1)
    assert ((counts - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("impossible", [1, 200])
def test_what_rounding_leaves_falls_to_no_impossible_token(impossible):
    """n times float32(1/n) is below 1, 1 or above, by the order of addition; which n does what is the processor's."""
    for n in range(2, 400):
        probs = torch.tensor([[1.0] * n + [0.0] * impossible]) / n
        assert pick_token(probs, torch.tensor([1 - 2**-24])).item() == n - 1


@given(
    st.lists(st.one_of(st.just(-math.inf), st.floats(-8, 3)), min_size=2, max_size=12).filter(
        lambda logits: max(logits) > -math.inf
    ),
    st.one_of(st.just(0.0), st.just(1 - 2**-24), st.floats(0, 1 - 2**-24, width=32)),
    st.sampled_from([1, 3, 4, 128]),
)
def test_a_picked_token_is_where_the_cumulative_distribution_passes_the_number(logits, uniform, block):
    probs = torch.softmax(torch.tensor([logits]), -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counter_rng, "BLOCK", block)
        token = int(pick_token(probs, torch.tensor([uniform])))
    probabilities = probs[0].double().tolist()
    total = sum(probabilities)
    assert probabilities[token] > 0
    assert sum(probabilities[:token]) / total <= uniform + 1e-6
    assert sum(probabilities[: token + 1]) / total >= uniform - 1e-6


def test_every_place_in_a_large_vocabulary_is_found():
    """One number in the middle of each of 1,000 tokens' shares, the last block not full."""
    probs_V = torch.softmax(torch.randn(1000, generator=torch.Generator().manual_seed(1)), 0)
    exact_V = probs_V.double()
    middle_B = ((exact_V.cumsum(0) - exact_V / 2) / exact_V.sum()).float()
    assert pick_token(probs_V.expand(1000, -1), middle_B).tolist() == list(range(1000))


def test_rows_may_stand_at_positions_of_their_own():
    ids, positions = torch.tensor([4, 4, 9]), torch.tensor([0, 3, 8])
    each = [keyed_uniform(1, 2, ids[i : i + 1], int(positions[i])).item() for i in range(3)]
    assert keyed_uniform(1, 2, ids, positions).tolist() == each

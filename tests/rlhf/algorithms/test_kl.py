"""KL estimators against the exact KL of distributions that are small enough to enumerate."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.kl import adaptive_kl_coef, approx_kl, k1, k3

logits = st.lists(st.floats(-4, 4), min_size=4, max_size=4)


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def test_k1_and_k3_by_hand():
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -0.5])
    torch.testing.assert_close(k1(logprobs, ref_logprobs), torch.tensor([0.5, -1.0, 0.0]))
    by_hand = torch.tensor([math.exp(-0.5) - 1 + 0.5, math.e - 2, 0.0])
    torch.testing.assert_close(k3(logprobs, ref_logprobs), by_hand)


@given(logits, logits)
def test_k1_and_k3_average_to_the_exact_kl(policy_logits, ref_logits):
    pi, ref = softmax(policy_logits), softmax(ref_logits)
    exact = sum(p * math.log(p / q) for p, q in zip(pi, ref, strict=True))
    pi_V, logpi_V, logref_V = torch.tensor(pi), torch.tensor(pi).log(), torch.tensor(ref).log()
    assert (pi_V * k1(logpi_V, logref_V)).sum().item() == pytest.approx(exact, abs=1e-5)
    assert (pi_V * k3(logpi_V, logref_V)).sum().item() == pytest.approx(exact, rel=1e-4, abs=1e-5)


def test_bfloat16_logprobs_are_compared_in_float32():
    logprob, ref_logprob = torch.tensor([-(2**-7), -100.0]).bfloat16()  # their bfloat16 difference would be 100
    assert k1(logprob, ref_logprob).item() == 100 - 2**-7


@given(st.floats(-80, 0, width=32), st.floats(-80, 0, width=32))
def test_k3_is_never_negative(logprob, ref_logprob):
    assert k3(torch.tensor(logprob), torch.tensor(ref_logprob)) >= 0


def test_as_losses_k1_pulls_nowhere_and_k3_towards_another_kl():
    """Why both are for rewards and for reading: compare the mean gradient with that of the exact KL."""
    policy_V = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    logref_V = torch.log_softmax(torch.tensor([1.0, 0.5, -0.5]), 0)
    logpi_V = torch.log_softmax(policy_V, 0)
    weights_V = logpi_V.exp().detach()

    def gradient(total):
        return torch.autograd.grad(total, policy_V, retain_graph=True)[0]

    exact = gradient((logpi_V.exp() * (logpi_V - logref_V)).sum())
    reverse = gradient((logref_V.exp() * (logref_V - logpi_V)).sum())
    torch.testing.assert_close(gradient((weights_V * k1(logpi_V, logref_V)).sum()), torch.zeros(3))
    torch.testing.assert_close(gradient((weights_V * k3(logpi_V, logref_V)).sum()), reverse)
    score_function = gradient((weights_V * k1(logpi_V, logref_V).detach() * logpi_V).sum())
    torch.testing.assert_close(score_function, exact)


def test_approx_kl_by_hand():
    new, old = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.5])
    torch.testing.assert_close(approx_kl(new, old), torch.tensor([0.0, 0.125]))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.101), (5.4, 0.099), (600.0, 0.102), (0.0, 0.098), (-3.0, 0.098)],
    ids=["on target", "10 % over", "10 % under", "far over", "none", "a negative estimate"],
)
def test_adaptive_kl_coef_by_hand(kl, expected):
    assert adaptive_kl_coef(0.1, kl, target=6.0, horizon=1000.0, n=100) == pytest.approx(expected)


@given(st.floats(-1e3, 1e6), st.integers(1, 10**7))
def test_one_update_moves_beta_by_a_fifth_at_most(kl, n):
    assert 0.08 <= adaptive_kl_coef(0.1, kl, target=6.0, horizon=1000.0, n=n) <= 0.12 + 1e-12

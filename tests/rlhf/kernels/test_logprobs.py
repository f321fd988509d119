"""Chunked logprobs against log_softmax of the whole logits, and the whole logits against plain Python."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.kernels import logprobs as module
from rlhf.kernels.logprobs import logprobs_and_entropy_from_hidden, logprobs_from_hidden

B, R, H, V = 3, 8, 2, 50
TEMPERATURES = [0.5, 1.0, 1.7]


@pytest.fixture
def case():
    """hidden_BRH, weight_VH, labels_BR"""
    generator = torch.Generator().manual_seed(0)
    hidden_BRH = torch.randn(B, R, H, generator=generator)
    weight_VH = torch.randn(V, H, generator=generator)
    return hidden_BRH, weight_VH, torch.randint(V, (B, R), generator=generator)


def whole(hidden_BRH, weight_VH, labels_BR, temperature):
    logprobs_BRV = torch.log_softmax((hidden_BRH @ weight_VH.T) / temperature, dim=-1)
    return logprobs_BRV.gather(-1, labels_BR[..., None])[..., 0]


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6), st.integers(0, 5), st.sampled_from(TEMPERATURES))
def test_logits_agree_with_plain_python(logits, label, temperature):
    label %= len(logits)
    scaled = [logit / temperature for logit in logits]
    top = max(scaled)
    log_total = top + math.log(sum(math.exp(s - top) for s in scaled))
    expected_entropy = -sum(math.exp(s - log_total) * (s - log_total) for s in scaled)
    logprob, entropy = of_logits(logits, label, temperature)
    assert logprob == pytest.approx(scaled[label] - log_total, abs=1e-4)
    assert entropy == pytest.approx(expected_entropy, abs=1e-4)


def of_logits(logits, label, temperature=1.0):
    """Logprob and entropy of one position, whose hidden state is 1 and whose weights are the logits."""
    one_111, weight_V1 = torch.ones(1, 1, 1), torch.tensor(logits).view(-1, 1)
    read = logprobs_and_entropy_from_hidden(one_111, weight_V1, torch.tensor([[label]]), temperature)
    return [x_11.item() for x_11 in read]


def test_huge_logits_stay_finite():
    assert of_logits([1e4, -1e4, 0.0], 1) == [-2e4, 0.0]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
@pytest.mark.parametrize("block", [1, 3, 1000])
def test_chunked_values_and_gradients_are_those_of_the_whole(case, temperature, chunk, block, monkeypatch):
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", block * 4 * V)
    monkeypatch.setitem(module.BLOCK_WORDS, "cpu", 7 * block)
    hidden_BRH, weight_VH, labels_BR = case
    weights_BR = torch.linspace(-1, 2, B * R).view(B, R)

    def run(function, *more):
        hidden, weight = hidden_BRH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        logprobs_BR = function(hidden, weight, labels_BR, temperature, *more)
        (logprobs_BR * weights_BR).sum().backward()
        return logprobs_BR, hidden.grad, weight.grad

    for chunked, expected in zip(run(logprobs_from_hidden, chunk), run(whole), strict=True):
        torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trains", [True, False])
def test_entropy_comes_with_the_logprobs_and_without_gradient(case, trains):
    hidden_BRH, weight_VH, labels_BR = case
    hidden_BRH.requires_grad_(trains)
    logprobs_BR, entropy_BR = logprobs_and_entropy_from_hidden(hidden_BRH, weight_VH, labels_BR, 1.7, chunk=5)
    torch.testing.assert_close(logprobs_BR, whole(hidden_BRH, weight_VH, labels_BR, 1.7), rtol=1e-5, atol=1e-5)
    expected_BR = torch.distributions.Categorical(logits=hidden_BRH @ weight_VH.T / 1.7).entropy()
    torch.testing.assert_close(entropy_BR, expected_BR.detach())
    assert logprobs_BR.requires_grad is trains and not entropy_BR.requires_grad


def test_asking_for_the_entropy_leaves_the_gradient_alone(case):
    hidden_BRH, weight_VH, labels_BR = case

    def gradient(function):
        hidden = hidden_BRH.clone().requires_grad_()
        function(hidden).sum().backward()
        return hidden.grad

    alone = gradient(lambda hidden: logprobs_from_hidden(hidden, weight_VH, labels_BR, chunk=5))
    together = gradient(lambda hidden: logprobs_and_entropy_from_hidden(hidden, weight_VH, labels_BR, chunk=5)[0])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("function", [logprobs_from_hidden, lambda *args: logprobs_and_entropy_from_hidden(*args)[0]])
def test_logits_of_more_than_a_chunk_never_exist(case, function):
    hidden_BRH, weight_VH, labels_BR = case
    chunk = 4
    with LargestTensor() as largest:
        function(hidden_BRH.requires_grad_(), weight_VH, labels_BR, 1.0, chunk).sum().backward()
    assert largest.numel == chunk * V


class Logits(TorchDispatchMode):
    """Every tensor of V columns that an operation made and that still exists."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim == 2 and result.shape[1] == V:
            self.made.append(weakref.ref(result))
        return result

    def rows(self):
        return sum(len(tensor) for made in self.made if (tensor := made()) is not None)


@pytest.mark.parametrize(("trains", "kept"), [(True, 4), (False, 0)])
def test_logits_of_the_last_chunk_alone_are_kept(case, trains, kept):
    hidden_BRH, weight_VH, labels_BR = case
    with Logits() as logits:
        logprobs_BR = logprobs_from_hidden(hidden_BRH.requires_grad_(trains), weight_VH, labels_BR, 1.0, chunk=4)
    assert logits.made and logits.rows() == kept
    del logprobs_BR


def test_a_chunk_has_its_logits_after_the_one_before_has_lost_them(case, monkeypatch):
    hidden_BRH, weight_VH, labels_BR = case
    linear, there = torch.nn.functional.linear, []

    def counted(*given):
        there.append(logits.rows())
        return linear(*given)

    monkeypatch.setattr(module.F, "linear", counted)
    with Logits() as logits:
        logprobs_from_hidden(
            hidden_BRH.requires_grad_(), weight_VH.requires_grad_(), labels_BR, 1.7, chunk=4
        ).sum().backward()
    assert there == [0] * len(there) and len(there) == 2 * B * R // 4 - 1


def test_a_second_backward_pass_gives_the_same_gradient(case):
    hidden_BRH, weight_VH, labels_BR = case
    logprobs_BR = logprobs_from_hidden(hidden_BRH.requires_grad_(), weight_VH.requires_grad_(), labels_BR, 1.7, chunk=5)
    of = (logprobs_BR.sum(), [hidden_BRH, weight_VH])
    for first, second in zip(
        torch.autograd.grad(*of, retain_graph=True), torch.autograd.grad(*of, retain_graph=True), strict=True
    ):
        torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_under_autocast_only_the_matrix_product_is_bfloat16(case):
    hidden_BRH, weight_VH, labels_BR = case
    weight_VH.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        logprobs_BR = logprobs_from_hidden(hidden_BRH, weight_VH, labels_BR, 1.7, chunk=5)
    rounded_BRV = (hidden_BRH.bfloat16() @ weight_VH.bfloat16().T).float()
    expected_BR = torch.log_softmax(rounded_BRV / 1.7, -1).gather(-1, labels_BR[..., None])[..., 0]
    assert logprobs_BR.dtype == torch.float32
    torch.testing.assert_close(logprobs_BR, expected_BR, rtol=1e-5, atol=1e-5)
    logprobs_BR.sum().backward()
    assert weight_VH.grad is not None and weight_VH.grad.isfinite().all() and weight_VH.grad.any()


def test_a_batch_without_responses_gives_an_empty_result_and_no_gradient(case):
    hidden_BRH, weight_VH, labels_BR = case
    logprobs_BR = logprobs_from_hidden(hidden_BRH[:, :0], weight_VH.requires_grad_(), labels_BR[:, :0])
    assert logprobs_BR.shape == (B, 0)
    logprobs_BR.sum().backward()
    assert weight_VH.grad is not None and not weight_VH.grad.any()

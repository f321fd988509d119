"""Norms in one operation, against transformers' own under autocast, and against the formula in float64."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.kernels.norm import RMSNorm, tune_norms

EPS, H = 1e-5, 48


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config)


def both():
    """The same norm, ours and that of transformers, with an input."""
    torch.manual_seed(0)
    ours, theirs = RMSNorm(H, EPS), LlamaRMSNorm(H, EPS)
    for norm in (ours, theirs):
        norm.weight.data = torch.linspace(0.2, 2, H)
    return ours, theirs, torch.randn(2, 7, H) * torch.logspace(-2, 2, 7)[:, None]


def read(norm, x, readers):
    """What some matrix products of the norm give under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
        return torch.cat([reader(y).float() for reader in readers])


def test_readers_get_the_same_bits():
    ours, theirs, x = both()
    readers = [nn.Linear(H, 5, bias=False)]
    assert torch.equal(read(ours, x, readers), read(theirs, x, readers))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype is torch.bfloat16  # for all readers, cast once


def test_gradients_are_those_of_the_formula():
    """The gradient that comes in is rounded to bf16, 2^-9, and is the same on both sides; float32 does the rest."""
    ours, _, x = both()
    grad = torch.randn(2, 7, H).bfloat16()
    given = [t.detach().clone().requires_grad_() for t in (x, ours.weight)]
    ours.weight = nn.Parameter(given[1])
    given[0].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(ours(given[0]), [given[0], ours.weight], grad)
    exact = [t.detach().double().requires_grad_() for t in given]
    y = exact[1] * exact[0] / (exact[0].square().mean(-1, keepdim=True) + EPS).sqrt()
    for own, other in zip(got, torch.autograd.grad(y, exact, grad.double()), strict=True):
        assert own.dtype is torch.float32
        torch.testing.assert_close(own.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_its_input_alone_is_kept_for_the_gradient():
    ours, _, x = both()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: SIM117
        with torch.autocast("cpu", torch.bfloat16):
            ours(x.requires_grad_())
    assert [t.data_ptr() for t in kept if t.numel() == x.numel()] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast_it_is_that_of_transformers(dtype):
    ours, theirs, x = both()
    out = ours(x.to(dtype))
    assert out.dtype is theirs(x.to(dtype)).dtype
    assert torch.equal(out, theirs(x.to(dtype)))


def test_a_model_keeps_its_names_and_what_heads_read_stays_float32(llama):
    names, tokens = list(llama.state_dict()), torch.tensor([[3, 4, 5]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = llama(tokens).logits
        tune_norms(llama)
        assert torch.equal(llama(tokens).logits, before)
        assert llama.model(tokens).last_hidden_state.dtype is torch.float32
    assert list(llama.state_dict()) == names
    assert sum(type(part) is RMSNorm for part in llama.modules()) == 4

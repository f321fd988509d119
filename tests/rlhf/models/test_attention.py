"""Causal attention in blocks, against its definition in float64."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import AttentionInterface

from rlhf.models import attention as room
from rlhf.models import hidden_states
from rlhf.models.attention import BLOCK, attend, causal_attention

SCALE = 0.3


def tensors(T, dtype, A=6, K=2, D=8):
    generator = torch.Generator().manual_seed(T)
    shapes = [(3, A, T, D), (3, K, T, D), (3, K, T, D), (3, A, T, D)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2).to(dtype) for x in made]  # as a model lays them out


def by_definition(q, k, v):
    """Every pair on its own: softmax over the tokens up to the query's, key heads repeated."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    score = SCALE * torch.einsum("batd,bald->batl", q, k)
    T = q.shape[2]
    unseen = torch.tensor([[column > row for column in range(T)] for row in range(T)])
    return torch.einsum("batl,bald->batd", score.masked_fill(unseen, -1e30).softmax(-1), v)


def with_gradients(function, q, k, v, grad):
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*given)
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


@pytest.mark.parametrize("T", [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_outputs_and_gradients_are_those_of_the_definition(T, dtype, off):
    """Rounding: 2^-24 and 2^-9 of products whose errors add up; measured 4e-7 and 5e-3."""
    q, k, v, grad = tensors(T, dtype)
    expected = with_gradients(by_definition, *(x.double() for x in (q, k, v, grad)))
    got = with_gradients(lambda q, k, v: causal_attention(q, k, v, SCALE), q, k, v, grad)
    for own, other in zip(got, expected, strict=True):
        assert own.dtype is dtype
        assert (own - other).norm() < off * other.norm()


@pytest.fixture
def calls(monkeypatch):
    """How often the blocks were taken."""
    made = []
    monkeypatch.setattr(room, "causal_attention", lambda *given: made.append(1) or causal_attention(*given))
    return made


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def test_a_model_takes_it_in_bf16_and_reads_what_torchs_kernel_reads(llama, calls):
    tokens_BT = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(20) >= torch.tensor([[0], [7], [15]])
    read = {}
    for name in ("sdpa", "eager"):
        llama.config._attn_implementation = name
        with torch.autocast("cpu", torch.bfloat16):
            read[name] = hidden_states(llama, tokens_BT, mask_BT).float()
    assert len(calls) == 2  # layers
    assert (read["sdpa"] - read["eager"]).norm() < 0.02 * read["eager"].norm()


def test_float32_and_masks_and_single_steps_are_left_to_torch(calls):
    q, k, v, _ = tensors(4, torch.float32)
    q16, k16, v16 = (x.bfloat16() for x in (q, k, v))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    module = torch.nn.Module()
    vars(module)["num_key_value_groups"] = 3
    for query, key, value, of_mask in ((q, k, v, None), (q16, k16, v16, mask), (q16[:, :, -1:], k16, v16, None)):
        out, _ = attend(module, query, key, value, of_mask, scaling=SCALE)
        expected = by_definition(*(x.double() for x in (q, k, v)))[:, :, -query.shape[2] :].transpose(1, 2)
        assert (out - expected).norm() < 0.01 * expected.norm()
    assert not calls


def test_transformers_knows_it():
    assert AttentionInterface()["sdpa"] is attend

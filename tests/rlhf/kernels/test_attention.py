"""Causal attention in blocks, against its definition in float64; and when packed rows go to flash attention."""

import itertools
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from rlhf.kernels import attention as room
from rlhf.kernels import enable_kernels
from rlhf.kernels.attention import BLOCK, attend, causal_attention
from rlhf.models import hidden_states
from stages.sft import response_logprobs

SCALE = 0.3
TOKENS_3T = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(0))
MASK_3T = torch.arange(20) >= torch.tensor([[7], [0], [15]])


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
    enable_kernels()
    read = {}
    for name in ("sdpa", "eager"):
        llama.config._attn_implementation = name
        with torch.autocast("cpu", torch.bfloat16):
            read[name] = hidden_states(llama, TOKENS_3T, MASK_3T).float()
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


@pytest.fixture
def flash(monkeypatch):
    """As on a GPU, packed rows go to flash attention; in its place they are read row by row, by the definition."""
    asked = []

    def varlen_attn(q_TAD, k_TKD, v_TKD, ends, ends_of_keys, longest, longest_key, *, scale, window_size, enable_gqa):
        """Of torch.nn.attention.varlen: a window of (-1, 0) is all that stands before, key heads are shared on demand."""
        assert window_size == (-1, 0) and enable_gqa and ends.dtype is torch.int32
        assert ends_of_keys is ends and longest == longest_key == max(ends.diff().tolist())
        assert [x.dtype for x in (q_TAD, k_TKD, v_TKD)] == [torch.bfloat16] * 3
        asked.append(ends.tolist())
        rows = []
        for first, last in itertools.pairwise(ends.tolist()):
            q, k, v = (x[None, first:last].transpose(1, 2).float() for x in (q_TAD, k_TKD, v_TKD))
            rows.append(by_definition(q * scale / SCALE, k, v)[0].transpose(0, 1))
        return torch.cat(rows).bfloat16()

    monkeypatch.setattr(room, "varlen_attn", varlen_attn)
    monkeypatch.setattr(room, "_has_flash", lambda device: True)
    return asked


def test_flash_attention_reads_packed_rows_as_they_are(llama, flash):
    with torch.autocast("cpu", torch.bfloat16):
        padded, packed = (hidden_states(llama, TOKENS_3T, MASK_3T, packing, 4) for packing in (False, True))
    assert flash == 2 * [[0, 13, 33, 38]]  # layers
    assert (packed - padded).norm() < 0.02 * padded.norm()


def test_flash_attention_reads_the_packed_rows_of_sft(llama, flash):
    """As TRL hands them over: all of a batch one behind the other."""
    rows = [row[mask].tolist() for row, mask in zip(TOKENS_3T, MASK_3T, strict=True)]
    given = [{"input_ids": row, "labels": row, "seq_lengths": [len(row)]} for row in rows]
    with torch.autocast("cpu", torch.bfloat16):
        packed = response_logprobs(llama, **DataCollatorForLanguageModeling(0, padding_free=True)(given))
        alone = [torch.log_softmax(llama(torch.tensor([row])).logits[0].float(), -1) for row in rows]
    assert flash == 2 * [[0, 13, 33, 38]]
    expected = torch.cat([x[range(len(row) - 1), row[1:]] for x, row in zip(alone, rows, strict=True)])
    assert (packed - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("precision", "tokens", "changed"),
    [
        (torch.float32, TOKENS_3T, {}),
        (torch.bfloat16, TOKENS_3T[[0, 0, 2]], {}),
        (torch.bfloat16, TOKENS_3T, {"sliding_window": 3}),
        (torch.bfloat16, TOKENS_3T, {"attention_chunk_size": 3}),
    ],
    ids=["float32", "a shared prompt", "windows", "chunks"],
)
def test_what_flash_attention_does_not_compute_is_left_to_torch(llama, flash, precision, tokens, changed):
    vars(llama.config).update(changed)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        hidden_states(llama, tokens, torch.ones_like(tokens), True, 4)
    assert not flash


@pytest.mark.parametrize("read", ["by PPO", "by SFT"])
def test_a_family_whose_mask_may_say_more_is_not_read_by_where_rows_end(llama, flash, read):
    vars(llama)["_supports_flash_attn"] = False
    ends = torch.tensor([0, 20], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        if read == "by PPO":
            hidden_states(llama, TOKENS_3T, MASK_3T, True, 4)
        else:
            response_logprobs(llama, TOKENS_3T[:1], input_ids=TOKENS_3T[:1], cu_seq_lens_q=ends, max_length_q=20)
    assert not flash


@pytest.mark.parametrize(("K", "D", "of_values", "T"), [(2, 12, 12, 4), (2, 16, 8, 4), (2, 8, 8, 3)])
def test_layers_of_other_shapes_are_left_to_torch(flash, K, D, of_values, T):
    """Heads of 12, values of another size than keys, fewer queries than keys."""
    q, k, v = (torch.randn(1, heads, 4, size).bfloat16() for heads, size in ((4, D), (K, D), (K, of_values)))
    module = torch.nn.Module()
    vars(module).update(num_key_value_groups=2, config=LlamaConfig())
    ends = torch.tensor([0, 4], dtype=torch.int32)
    attend(module, q[:, :, -T:], k, v, None, cu_seq_lens_q=ends, max_length_q=4)
    assert not flash


@pytest.mark.integration  # a process of its own
def test_transformers_knows_it_once_it_is_switched_on_and_not_before():
    show = "from transformers.modeling_utils import AttentionInterface as A; print(A()['sdpa'].__module__)"
    code = f"import rlhf.models, rlhf.ppo.trainer; {show}; import rlhf; print(len(rlhf.enable_kernels())); {show}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert told == ["transformers.integrations.sdpa_attention", "2", attend.__module__]

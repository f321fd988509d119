"""Packed rows that share their prompts, against lists of tokens and against plain passes over one row at a time."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf.data import pad
from rlhf.errors import UserError
from rlhf.models import ScalarModel, check_packing
from rlhf.models.packing import pack
from rlhf.models.policy import PolicyModel

VOCAB, TEMPERATURE = 12, 0.7
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.25,
}


def llama(**more: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **more))


MODELS = {
    "sdpa": lambda: llama(attn_implementation="sdpa"),
    "eager": lambda: llama(attn_implementation="eager"),
    "one key head": lambda: llama(num_key_value_heads=1),
    "absolute positions": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            initializer_range=0.4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ),
}
ROWS = [  # prompt and answer; two prompts begin alike, one is a single token, answers of one prompt are alike
    ([1, 5, 6, 7], [8, 9, 2]),
    ([1, 5, 6], [4, 4, 4, 4, 2]),
    ([1, 5, 6, 7], [3]),
    ([1], [5, 6, 7, 8]),
    ([1, 5, 6, 7], [8, 9, 10, 11, 2]),
    ([1, 5, 6], [4, 4, 4, 4, 2]),
]


def batch(rows):
    """tokens_BT, mask_BT and R; the padding holds a token that also stands in prompts."""
    prompts, answers = (
        pad(side, 5, left=left) for side, left in zip(zip(*rows, strict=True), (True, False), strict=True)
    )
    return (*(torch.cat(both, 1) for both in zip(prompts, answers, strict=True)), answers[0].shape[1])


PROMPT, ANSWER = (
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
    st.lists(st.integers(0, 1), min_size=1, max_size=4),
)


@given(st.lists(st.tuples(PROMPT, ANSWER), min_size=1, max_size=7))
def test_a_pack_reads_a_prompt_once_and_every_token_sees_what_stands_before_it_in_its_row(rows):
    tokens_BT, mask_BT, R = batch(rows)
    packed = pack(tokens_BT, mask_BT, R)
    read_N = tokens_BT[packed.read_BT].tolist()
    once = {tuple(prompt) for prompt, _ in rows}
    assert len(read_N) == sum(map(len, once)) + sum(len(answer) for _, answer in rows)
    assert (packed.sees_NN is None) == (len(once) == len(rows))
    for (prompt, answer), place_T, mask_T in zip(rows, packed.place_BT, mask_BT, strict=True):
        places = place_T[mask_T].tolist()
        assert [read_N[place] for place in places] == prompt + answer
        for i, place in enumerate(places):
            if packed.sees_NN is not None:
                assert packed.sees_NN[place].nonzero()[:, 0].tolist() == sorted(places[: i + 1])
    answers = [
        place for place_T, mask_T in zip(packed.place_BT, mask_BT, strict=True) for place in place_T[-R:][mask_T[-R:]]
    ]
    assert len(set(map(int, answers))) == len(answers)


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(1)
    return MODELS[request.param]()


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def assert_same(got, expected):
    """The sums of float32 in another order move a figure by some 1e-7 of it."""
    assert (got - expected).norm() <= 1e-5 * expected.norm()


def test_logprobs_and_their_gradient_are_those_of_one_row_at_a_time(model):
    plain, weights = copy.deepcopy(model), torch.randn(len(ROWS), 5)
    expected = []
    for (prompt, answer), weight_R in zip(ROWS, weights, strict=True):
        logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        expected.append(torch.log_softmax(logits, -1)[range(len(answer)), answer])
        (expected[-1] * weight_R[: len(answer)]).sum().backward()
    tokens_BT, mask_BT, R = batch(ROWS)
    logprobs_BR, _ = PolicyModel(model, packing=True)(tokens_BT, mask_BT, R, TEMPERATURE)
    (logprobs_BR * weights).sum().backward()
    assert_same(logprobs_BR[mask_BT[:, -R:]], torch.cat(expected))
    assert_same(gradients(model), gradients(plain))


def test_values_and_their_gradient_are_those_of_one_row_at_a_time(model):
    plain, head_1H = copy.deepcopy(model), torch.randn(1, 16)
    tokens_BT, mask_BT, R = batch(ROWS)
    weights = torch.randn(mask_BT.shape)
    expected = []
    for row, (prompt, answer) in enumerate(ROWS):
        values_T = plain.base_model(torch.tensor([prompt + answer])).last_hidden_state[0] @ head_1H[0]
        expected.append(values_T)
        (values_T * weights[row][mask_BT[row]]).sum().backward()
    critic = ScalarModel(model.base_model, head_1H)
    critic.packing = True
    values_BT = critic(tokens_BT, mask_BT, R)
    (values_BT * weights)[mask_BT].sum().backward()
    assert_same(values_BT[mask_BT], torch.cat(expected))
    assert_same(gradients(critic.backbone), gradients(plain.base_model))


def test_what_is_shared_is_computed_once(model):
    seen = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].tolist()))
    PolicyModel(model, packing=True)(*batch(ROWS), TEMPERATURE)
    first = seen[0][0]
    assert len(seen) == 1 and len(first) == (4 + 3 + 1) + sum(len(answer) for _, answer in ROWS)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_in_bf16_too_the_mask_fits_what_attention_computes(model, precision):
    tokens_BT, mask_BT, R = batch(ROWS)
    with torch.no_grad(), torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        shared, padded = (PolicyModel(model, packing)(tokens_BT, mask_BT, R, 1.0)[0] for packing in (True, False))
    assert (shared - padded).abs().max() < (0.1 if precision == torch.bfloat16 else 1e-5)


def test_models_that_could_not_share_are_refused_where_they_should():
    windows = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4))
    check_packing(windows, "ppo.packing")
    with pytest.raises(UserError, match=r"ppo\.packing") as caught:
        check_packing(windows, "ppo.packing", sharing=True)
    assert caught.value.exit_code == 4
    for make in MODELS.values():
        check_packing(make(), "ppo.packing", sharing=True)


def test_a_family_that_does_not_follow_the_mask_is_refused(monkeypatch):
    torch.manual_seed(1)
    llama = MODELS["sdpa"]()
    forward = llama.model.forward
    monkeypatch.setattr(llama.model, "forward", lambda attention_mask=None, **rest: forward(**rest))
    with pytest.raises(UserError, match=r"ppo\.packing"):
        check_packing(llama, "ppo.packing", sharing=True)


def test_where_a_window_ends_prompts_are_read_for_each_answer():
    """As the plain model does, whose window is shorter than the rows."""
    torch.manual_seed(1)
    windows = MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4))
    tokens_BT, mask_BT, R = batch(ROWS)
    packed, _ = PolicyModel(windows, packing=True)(tokens_BT, mask_BT, R, 1.0)
    for row, (prompt, answer) in enumerate(ROWS):
        logits = windows(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1)[range(len(answer)), answer]
        torch.testing.assert_close(packed[row, : len(answer)], expected, atol=1e-5, rtol=0)

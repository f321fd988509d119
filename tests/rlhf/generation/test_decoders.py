"""Both ways to run a model, the tuned one and the model's own, against plain forward passes and `generate`."""

import copy
import dataclasses

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from rlhf.config import LoraConfig
from rlhf.data.batches import select
from rlhf.generation import InProcessSampler
from rlhf.generation.decoder import CausalDecoder
from rlhf.generation.in_process import decoder_of
from rlhf.generation.llama import LlamaDecoder
from rlhf.kernels import linear
from rlhf.models import add_lora
from rlhf.models.policy import PolicyModel

EOS, PAD, R, VOCAB, T = 2, 0, 9, 12, 0.7
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}


def llama(**settings):
    return LlamaForCausalLM(LlamaConfig(**SHAPE | settings))


def with_lora(**settings):
    model = add_lora(llama(**settings), LoraConfig(rank=2, targets=["q_proj", "up_proj"]), "causal", 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


TUNED = {
    "plain": llama,
    "shared key heads": lambda: llama(num_key_value_heads=2),
    "one key head": lambda: llama(num_key_value_heads=1),
    "wide heads": lambda: llama(head_dim=10),
    "tied": lambda: llama(tie_word_embeddings=True),
    "eager attention": lambda: llama(attn_implementation="eager"),
}
OWN = {
    "attention bias": lambda: llama(attention_bias=True),
    "MLP bias": lambda: llama(mlp_bias=True),
    "scaled positions": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "other activation": lambda: llama(hidden_act="gelu"),
    "LoRA": with_lora,
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4)),
    "absolute positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5)
    ),
    "OPT": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            init_std=0.3,
            pad_token_id=PAD,
        )
    ),
}


@pytest.fixture(params=[*TUNED, *OWN])
def model(request):
    torch.manual_seed(3)
    return (TUNED | OWN)[request.param]().eval()


@pytest.mark.parametrize("kind", [*TUNED, *OWN])
def test_a_model_is_run_the_tuned_way_only_where_that_computes_the_same(kind):
    decoder = decoder_of((TUNED | OWN)[kind]())
    assert type(decoder) is (LlamaDecoder if kind in TUNED else CausalDecoder)


def test_behaviour_logprobs_are_those_of_plain_forward_passes_without_padding(model, sample, plain_logprobs):
    rollout = sample(model=model, batch_size=3)
    for got_R, expected in zip(rollout.behaviour_logprobs_BR, plain_logprobs(model, rollout, T), strict=True):
        torch.testing.assert_close(got_R[: len(expected)], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("packing", [False, True])
def test_the_training_model_reads_the_same_logprobs(model, sample, packing):
    if packing and model.config.model_type == "opt":
        pytest.skip("packed rows of OPT see one another; PPO refuses them")
    rollout = sample(model=model)
    read_BR, _ = PolicyModel(model, packing)(rollout.tokens_BT, rollout.mask_BT, R, T)
    assert (read_BR - rollout.behaviour_logprobs_BR)[rollout.response_mask_BR].abs().max() < 2e-5


def test_a_row_has_the_same_answer_alone(model, sample, answers, prompts):
    together = answers(sample(model=model, batch_size=3))
    assert together == [answers(sample(select(prompts, [i]), model=model))[0] for i in range(8)]


@pytest.mark.parametrize("slots", [4, 9])
def test_rows_that_share_the_reading_of_their_prompt_have_the_same_answers_alone(
    model, sample, answers, prompts, slots
):
    """Three answers for each of three prompts, not next to each other."""
    given = dataclasses.replace(select(prompts, [0, 1, 2] * 3), ids_B=torch.arange(9))
    together = answers(sample(given, model=model, batch_size=slots))
    assert together == [answers(sample(select(given, [i]), model=model))[0] for i in range(9)]
    assert len({tuple(answer) for answer in together}) > 5


@pytest.mark.parametrize("kind", ["shared key heads", "absolute positions"])
def test_bf16_is_as_exact_as_the_models_own_forward_pass_in_bf16(kind, sample, answers, plain_logprobs):
    """Both differ from float32 by rounding; ours may not by more than the model's own passes do, within a half."""
    torch.manual_seed(3)
    model = (TUNED | OWN)[kind]().eval()
    exact = copy.deepcopy(model)
    rollout = sample(model=model, precision="bf16", batch_size=5)  # rounds the weights of `model`
    for rounded, parameter in zip(model.parameters(), exact.parameters(), strict=True):
        parameter.data = rounded.data.float()
    ours = [row[: len(answer)] for row, answer in zip(rollout.behaviour_logprobs_BR, answers(rollout), strict=True)]
    ours, own, expected = (torch.cat(x) for x in (ours, *(plain_logprobs(m, rollout, T) for m in (model, exact))))
    assert rollout.behaviour_logprobs_BR.dtype == torch.float32
    assert 0 < (ours - expected).abs().mean() < 1.5 * (own - expected).abs().mean()


def test_without_packed_weights_the_answers_are_the_same(sample, expect_same_rollout, monkeypatch):
    torch.manual_seed(3)
    model = llama(num_key_value_heads=2).eval()
    packed = sample(model=model)
    monkeypatch.setattr(linear, "can_pack", lambda weight: False)
    expect_same_rollout(sample(model=model), packed)


def test_loaded_weights_reach_the_tuned_forward_pass(prompts, ppo_config, expect_same_rollout):
    torch.manual_seed(3)
    old, new = (llama(num_key_value_heads=2, tie_word_embeddings=True).eval() for _ in range(2))
    sampler = InProcessSampler(old, [EOS], PAD)
    sampler.sample(prompts, ppo_config.sampling, 0, 1)
    sampler.load_weights(new.named_parameters())
    expected = InProcessSampler(new, [EOS], PAD).sample(prompts, ppo_config.sampling, 0, 1)
    expect_same_rollout(sampler.sample(prompts, ppo_config.sampling, 0, 1), expected)


@pytest.mark.parametrize("kind", ["shared key heads", "absolute positions"])
def test_answers_are_distributed_as_those_of_generate(kind, sample, prompts):
    """Chi-square of two samples: the first two tokens of 6,000 answers to one prompt."""
    torch.manual_seed(3)
    model, N = (TUNED | OWN)[kind]().eval(), 6000
    one = select(prompts, [0] * N)
    ours = sample(dataclasses.replace(one, ids_B=torch.arange(N)), model=model, max_new_tokens=2, batch_size=N)
    theirs = model.generate(
        one.tokens_BP,
        attention_mask=one.mask_BP.long(),
        do_sample=True,
        temperature=T,
        top_k=0,
        top_p=1.0,
        max_new_tokens=2,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    counts = [
        torch.bincount(tokens[:, -2] * VOCAB + tokens[:, -1], minlength=VOCAB**2).double()
        for tokens in (ours.tokens_BT, theirs)
    ]
    seen = counts[0] + counts[1] >= 20  # rarer pairs are one class
    table = torch.stack([torch.cat([c[seen], c[~seen].sum(0, keepdim=True)]) for c in counts])
    chi_square = float(((table[0] - table[1]) ** 2 / (table[0] + table[1]).clamp(min=1)).sum())
    freedom = table.shape[1] - 1
    assert freedom > 10
    assert chi_square < freedom + 3.1 * (2 * freedom) ** 0.5 + 5  # beyond p = 0.001 for these degrees of freedom

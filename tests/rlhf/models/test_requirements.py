from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BloomConfig,
    CTRLConfig,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    RobertaConfig,
    T5Config,
)

from launch.settings import load
from rlhf.models.requirements import misfits, positions

SMOKE = Path(__file__).parents[2] / "smoke.yaml"
SHORT = ["--sft.max_length", "100", "--reward.max_length", "100", "--ppo.max_prompt_length", "60"]
SHORT += ["--ppo.sampling.max_new_tokens", "40", "--sft.packing", "false"]


def said(model, *overrides: str) -> list[str]:
    return [text for text, _ in misfits(load(SMOKE, [*SHORT, *overrides]), model)]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=64), 64),
        (OPTConfig(max_position_embeddings=64), 64),
        (MistralConfig(max_position_embeddings=64, sliding_window=8), 64),
        (RobertaConfig(max_position_embeddings=66, pad_token_id=1), 64),
        (MptConfig(max_seq_len=64), 64),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 2.0}), 128),
    ],
)
def test_positions_of_each_family(config, limit):
    assert positions(config) == limit


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, GPT2Config, OPTConfig, Qwen2Config])
def test_families_that_train_are_taken(config):
    assert said(config()) == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [("sft.max_length", "101"), ("reward.max_length", "101"), ("ppo.max_prompt_length", "61")],
)
def test_a_length_of_any_stage_beyond_the_positions_is_refused(setting, value):
    model = LlamaConfig(max_position_embeddings=100)
    assert said(model) == []
    (text,) = said(model, f"--{setting}", value)
    assert setting in text and "101 tokens, and the model has 100 positions" in text


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (GraniteConfig(), "no sequence classifier for granite"),
        (T5Config(), "t5 is no causal language model"),
        (BertConfig(), "bert is no causal language model"),
        (GraniteConfig(logits_scaling=8.0), "logits_scaling"),
        (PhiConfig(), "bias"),
        (GPTJConfig(), "bias"),
        (CTRLConfig(), "bias"),
        (ModernBertDecoderConfig(), "bias"),
    ],
)
def test_a_family_that_some_stage_cannot_train_is_refused_with_what_to_use(model, reason):
    texts = [text for text in said(model, "--model.attention", "eager") if reason in text]
    assert texts and "use a model of another family" in texts[0]


def test_attention_that_a_family_lacks_is_refused_with_what_it_has():
    assert said(BloomConfig()) == ["model.attention: bloom models have no sdpa; set model.attention to eager"]
    assert said(BloomConfig(), "--model.attention", "eager") == []


def test_packing_that_a_family_cannot_do_is_refused_with_its_setting():
    (text,) = said(BloomConfig(), "--model.attention", "eager", "--sft.packing", "true")
    assert "set sft.packing to false" in text
    sharing = ("--ppo.packing", "true", "--ppo.group_size", "2")
    (text,) = said(MistralConfig(sliding_window=8), *sharing)
    assert "set ppo.packing to false, or ppo.group_size to 1" in text
    assert said(LlamaConfig(), *sharing) == []


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (LlamaConfig(num_attention_heads=4, num_key_value_heads=1), ""),
        (Qwen2Config(num_attention_heads=8), ""),
        (LlamaConfig(hidden_size=384, num_attention_heads=6), "4 workers cannot share 6 attention heads equally"),
        (MistralConfig(num_attention_heads=8, sliding_window=8), "cannot be divided"),
        (BloomConfig(n_head=8), "cannot be divided"),
    ],
)
def test_models_whose_sequences_cannot_be_divided_are_refused(model, reason):
    hardware = "{workers: 4, workers_per_reward_model: null, sequence_parallel: 4}"
    more = ["--hardware", hardware, "--model.tiny.heads", "4", "--sft.batch_size", "4"]
    found = [text for text in said(model, *more) if "sequence_parallel" in text]
    assert (reason in found[0]) if reason else found == []

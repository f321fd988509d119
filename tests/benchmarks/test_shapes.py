"""Random weights in known shapes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shapes import SHAPES, random_model
from rlhf.models import load_causal, load_tokenizer

PUBLISHED = {"135M": 134_515_008, "1B": 1_100_048_384, "7B": 6_738_415_616}  # SmolLM2, TinyLlama, Llama 2


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_shape_has_the_published_number_of_weights(shape):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[shape]


def test_a_random_model_is_an_ordinary_folder_and_the_same_every_time(tmp_path):
    one, other = (load_causal(random_model("tiny", tmp_path / name)) for name in "ab")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    tokenizer = load_tokenizer(tmp_path / "a")
    assert len(tokenizer) <= one.config.vocab_size and tokenizer.pad_token_id != tokenizer.eos_token_id

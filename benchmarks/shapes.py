"""Llamas of known shapes with random weights, as ordinary folders: speed does not depend on the values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import reward_data
from rlhf.models import save_causal
from rlhf.models.tiny import train_tokenizer

WORDS = 768  # of the tokenizer: the shipped texts fill no larger one, and a row of the table more costs the same
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": WORDS},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},  # SmolLM2
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    | {"num_key_value_heads": 4, "vocab_size": 32000},  # TinyLlama
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32000},  # Llama 2
}


def random_model(shape: str, folder: Path) -> Path:
    """`folder`, with a Llama of that shape and a tokenizer trained on the shipped demonstrations; float32."""
    texts = [m.content for row in reward_data.load("demonstrations", "shipped").rows for m in row.messages]
    tokenizer = train_tokenizer(texts, WORDS)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_causal(LlamaForCausalLM(config), folder, tokenizer)
    return folder


def given_or_random(model: str | None, shape: str, folder: Path) -> Path:
    """The folder of `model`, or one of random weights made in `folder`."""
    return Path(model).absolute() if model else random_model(shape, folder / "base")

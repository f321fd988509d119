"""A tokenizer, a Llama of two layers in an ordinary folder, and a batch of unequal lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config import TinyConfig
from rlhf.data import pad
from rlhf.models import ScalarModel, load_scalar, save_causal
from rlhf.models.tiny import train_tokenizer, untrained_llama

SHAPE = TinyConfig(vocab_size=280, hidden_size=32, intermediate_size=48, layers=2, heads=4)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer(["hello there, how are you?", "fine, and you?"] * 5, SHAPE.vocab_size)


@pytest.fixture(scope="session")
def causal_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "causal"
    save_causal(untrained_llama(SHAPE, tokenizer, seed=0), folder, tokenizer)
    return folder


@pytest.fixture
def scalar(causal_folder: Path) -> ScalarModel:
    """A reward model with a head that is not zero."""
    model = load_scalar(causal_folder)
    torch.nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def sequences() -> list[list[int]]:
    """Ids without pad (3), as chat dialogues are."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 280, (length,), generator=generator).tolist() for length in (9, 4, 1, 7)]


@pytest.fixture
def right_padded(sequences: list[list[int]], tokenizer: Any) -> tuple[Tensor, Tensor]:
    return pad(sequences, tokenizer.pad_token_id)

"""A new small Llama, with a tokenizer trained on the run's demonstrations."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.chat import llama2
from rlhf.config import RunConfig, TinyConfig
from rlhf.data.parsed import training_demonstrations
from rlhf.errors import UserError
from rlhf.models.pretrained import save_causal

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
POSITIONS = 8192
RECORD = "tiny.json"


def make_tiny(config: RunConfig) -> Path:
    """`<run>/base`: tokenizer and untrained model, made again if the shape, the seed or the texts changed.

    The folder appears by a rename, so several processes may call this at once.
    """
    tiny, folder = config.model.tiny, config.folder / "base"
    _check_shape(tiny)
    texts = [m.content for row in training_demonstrations(config) for m in row.messages]
    record = {"shape": tiny.model_dump(), "seed": config.seed, "texts": _digest(texts)}
    if _record(folder) == record:
        return folder
    config.folder.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".base-", dir=config.folder))
    try:
        tokenizer = train_tokenizer(texts, tiny.vocab_size)
        save_causal(untrained_llama(tiny, tokenizer, config.seed), work, tokenizer)
        (work / RECORD).write_text(json.dumps(record, indent=1))
        _put_in_place(work, folder, record)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-level BPE with single digits. It can encode any text, and the chat tags take few tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(texts)
    tags = f"{llama2.B_INST} {llama2.E_INST} {llama2.B_SYS}{llama2.E_SYS}"
    backend.train_from_iterator([*texts, *[tags] * (len(texts) // 2)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=POSITIONS, **SPECIAL)
    tokenizer.chat_template = llama2.TEMPLATE
    return tokenizer


def untrained_llama(tiny: TinyConfig, tokenizer: Any, seed: int) -> LlamaForCausalLM:
    """A Llama of this shape with seeded random weights; the caller's random state does not change."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=tiny.hidden_size,
        intermediate_size=tiny.intermediate_size,
        num_hidden_layers=tiny.layers,
        num_attention_heads=tiny.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _check_shape(tiny: TinyConfig) -> None:
    smallest = 256 + len(SPECIAL)
    if tiny.vocab_size < smallest:
        raise UserError(f"model.tiny.vocab_size is {tiny.vocab_size}; 256 bytes and special tokens need {smallest}")
    if tiny.hidden_size % (2 * tiny.heads):
        raise UserError(
            f"model.tiny.hidden_size {tiny.hidden_size} must be a multiple of 2 × model.tiny.heads ({tiny.heads})"
        )


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return None


def _put_in_place(work: Path, folder: Path, record: dict[str, Any]) -> None:
    """Renames `work` to `folder`. An old folder is removed; an equal one of another process is kept."""
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    try:
        if folder.exists() and _record(folder) != record:
            os.replace(folder, old / "base")
        os.rename(work, folder)
    except OSError:
        if _record(folder) != record:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)

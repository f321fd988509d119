"""Rows as tokens, and prompts as batches.

Rows that are too long are left out and counted, never truncated: a truncated response would teach the model to stop in
the middle.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reward_data import Demonstration, Preference, Prompt
from rlhf.chat import format_of
from rlhf.config import RunConfig
from rlhf.data import batches
from rlhf.data.batches import PromptBatch
from rlhf.errors import UserError

log = logging.getLogger(__name__)

MARGINS: dict[str, dict[str, float]] = {  # Llama 2, table 27
    "none": {"significantly": 0.0, "better": 0.0, "slightly": 0.0, "negligibly": 0.0, "unrated": 0.0},
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0, "unrated": 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0, "unrated": 0.0},
}
SAFETY = {"safe": 1, "unsafe": 0, "unknown": -1}


def encode_demonstrations(tokenizer: Any, rows: Sequence[Demonstration], max_length: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `assistant_masks` of each row, as TRL's SFTTrainer names them; rows over `max_length` left
    out."""

    chat = format_of(tokenizer)

    def encode(row: Demonstration) -> dict[str, list[int]]:
        ids, mask = chat.encode(row.messages)
        return {"input_ids": ids, "assistant_masks": mask}

    return _encode_all("demonstrations", rows, encode, lambda row: len(row["input_ids"]), max_length)


def encode_preferences(
    tokenizer: Any, rows: Sequence[Preference], margin: str, max_length: int
) -> list[dict[str, Any]]:
    """`chosen_ids`, `rejected_ids` and `margin` of each pair, as TRL's RewardTrainer names them; pairs with a side over
    `max_length` left out. `chosen_is_safe` and `rejected_is_safe` are 1, 0, or -1 if unknown.
    """

    chat = format_of(tokenizer)

    def encode(row: Preference) -> dict[str, Any]:
        return {
            "chosen_ids": chat.encode_response(row.prompt, row.chosen),
            "rejected_ids": chat.encode_response(row.prompt, row.rejected),
            "margin": MARGINS[margin][row.rating],
            "chosen_is_safe": SAFETY[row.chosen_safety],
            "rejected_is_safe": SAFETY[row.rejected_safety],
        }

    def length(pair: dict[str, Any]) -> int:
        return max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))

    return _encode_all("preferences", rows, encode, length, max_length)


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt(Prompt):
    tokens: list[int] = field(hash=False)


def short_prompts(tokenizer: Any, prompts: Sequence[Prompt], max_prompt_length: int) -> list[EncodedPrompt]:
    """The prompts that fit into `max_prompt_length` tokens, with their tokens, so that no batch encodes them again."""
    chat = format_of(tokenizer)

    def encode(row: Prompt) -> EncodedPrompt:
        return EncodedPrompt(**vars(row), tokens=chat.encode_prompt(row.messages))

    return _encode_all("prompts", prompts, encode, lambda row: len(row.tokens), max_prompt_length)


def _encode_all(
    kind: str, rows: Sequence[Any], encode: Callable[[Any], Any], length: Callable[[Any], int], max_length: int
) -> list:
    encoded = [_with_source(row, encode) for row in rows]
    short = [row for row in encoded if length(row) <= max_length]
    if len(short) < len(encoded):
        log.warning("%d of %d %s left out: over %d tokens", len(encoded) - len(short), len(encoded), kind, max_length)
    if not short and encoded:
        raise UserError(f"all {len(encoded)} {kind} are over {max_length} tokens; raise the length of this stage", 3)
    return short


def _with_source(row: Any, encode: Callable[[Any], Any]) -> Any:
    try:
        return encode(row)
    except UserError as error:
        raise UserError(f"{row.source}: {error.message}", error.exit_code) from error


def prompt_batch(tokenizer: Any, prompts: Sequence[Prompt], ids: Sequence[int], max_prompt_length: int) -> PromptBatch:
    """Prompts, left-padded. `ids`: keys of the random numbers of their responses. UserError (3) if one is too long."""
    chat = format_of(tokenizer)

    def tokens_of(row: Prompt) -> list[int]:
        return row.tokens if isinstance(row, EncodedPrompt) else chat.encode_prompt(row.messages)

    encoded = [_with_source(row, tokens_of) for row in prompts]
    for row, tokens in zip(prompts, encoded, strict=True):
        if len(tokens) > max_prompt_length:
            raise UserError(f"{row.source}: the prompt has {len(tokens)} tokens, over {max_prompt_length}", 3)
    tokens_BP, mask_BP = pad(encoded, tokenizer.pad_token_id, left=True)
    is_safety_B = torch.tensor([row.tag == "safety" for row in prompts])
    return PromptBatch(tokens_BP, mask_BP, is_safety_B, torch.tensor(ids, dtype=torch.long))


def next_prompts(tokenizer: Any, prompts: Sequence[Any], config: RunConfig, iteration: int) -> PromptBatch:
    """The iteration's prompts, the same on all ranks: a new permutation for every epoch over the prompts, and each
    prompt `group_size` times.

    Ids also count epochs and responses, so a prompt that is drawn twice in an iteration gets different responses.
    """
    group = config.ppo.group_size
    size, count, ids = config.ppo.batch_size // group, len(prompts), []
    for draw in range((iteration - 1) * size, iteration * size):
        epoch, place = divmod(draw, count)
        if not ids or place == 0:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
            order = torch.randperm(count, generator=generator).tolist()
        ids.append(epoch * count + order[place])
    once = prompt_batch(tokenizer, [prompts[i % count] for i in ids], ids, config.ppo.max_prompt_length)
    response_B = torch.arange(size * group)
    repeated = batches.select(once, response_B // group)
    return replace(repeated, ids_B=repeated.ids_B * group + response_B % group)


def pad(sequences: Sequence[Sequence[int]], pad_id: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """tokens_BT int64 and mask_BT bool of sequences of different lengths; the mask comes from the lengths."""
    longest = max(len(sequence) for sequence in sequences)
    tokens_BT = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        tokens_BT[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask_BT[row, place] = True
    return tokens_BT, mask_BT

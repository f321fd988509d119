"""The input and output of a reward."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reward_data import Prompt
from rlhf.chat import format_of
from rlhf.data.batches import Rollout


@dataclass(frozen=True)
class Responses:
    """This rank's responses, as tokens and as text."""

    rollout: Rollout
    prompts: Sequence[Prompt]  # of each row: messages, tag and the columns of its record
    texts: Sequence[str]

    def column(self, name: str) -> list[Any]:
        """The values of a column; None for rows without it."""
        return [prompt.columns.get(name) for prompt in self.prompts]


def responses_of(rollout: Rollout, prompts: Sequence[Prompt], tokenizer: Any) -> Responses:
    """The input of rewards: the responses of a rollout as tokens and as text, with their prompts."""
    R = rollout.response_mask_BR.shape[1]
    lengths = rollout.response_mask_BR.sum(1).tolist()
    tokens = rollout.tokens_BT[:, -R:].tolist()
    chat = format_of(tokenizer)
    texts = [chat.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]
    return Responses(rollout, prompts, texts)


def text_responses(prompts: Sequence[Prompt], texts: Sequence[str], finished: Sequence[bool]) -> Responses:
    """The input of rewards where only texts are known, of an endpoint's responses for instance: no row has tokens."""
    B = len(texts)
    none_B0 = torch.zeros(B, 0, dtype=torch.int64)
    rollout = Rollout(
        tokens_BT=none_B0,
        mask_BT=none_B0.bool(),
        response_mask_BR=none_B0.bool(),
        behaviour_logprobs_BR=none_B0.float(),
        finished_B=torch.tensor(finished, dtype=torch.bool),
    )
    return Responses(rollout, prompts, texts)


@dataclass(frozen=True)
class Scored:
    values_B: Tensor  # float32; 0 where the score failed
    failed_B: Tensor  # bool: the row has no score, and is left out of the update


def is_reward(given: Any) -> bool:
    """Whether a callable says of itself that it is a `Reward`, by the type that it returns."""
    try:
        returns = inspect.signature(given).return_annotation
    except (TypeError, ValueError):
        return False
    return returns is Scored or returns in ("Scored", "rewards.Scored", "rlhf.rewards.Scored")


class Reward(Protocol):
    def __call__(self, responses: Responses) -> Scored:
        """Scores of this rank's rows. Every rank calls it at the same time, with equally many rows."""
        ...

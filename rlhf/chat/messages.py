"""What all chat formats share: messages, the ids that end a response, and text from sampled ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

from rlhf.errors import UserError


class ChatMessage(Protocol):
    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class Turn(NamedTuple):
    """A message made by this package."""

    role: str
    content: str


def require_last(messages: Sequence[ChatMessage], role: str) -> None:
    """UserError (3) unless the last message is the assistant's (a dialogue to train on) or the user's (a prompt)."""
    last = messages[-1].role if messages else None
    if last == role:
        return
    what = (
        "a prompt must end with a user message"
        if role == "user"
        else ("a dialogue to train on must end with an assistant message")
    )
    raise UserError(f"{what}, this one ends with {f'the {last}' if last else 'no message'}", 3)


def eos_ids(tokenizer: Any) -> list[int]:
    """The tokenizer's EOS, then those that `load_tokenizer` found in the model's generation settings."""
    found = [tokenizer.eos_token_id, *getattr(tokenizer, "model_eos_ids", ())]
    return list(dict.fromkeys(token for token in found if token is not None))


def decode_response(tokenizer: Any, ids: Sequence[int], stop_ids: Collection[int]) -> str:
    """Text of sampled ids up to the first stop id, without special tokens and surrounding spaces."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()

"""The chat formats by name, and which of them a tokenizer has. To add one, write a class and a line in FORMATS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from rlhf.chat.llama2 import Llama2
from rlhf.chat.messages import ChatMessage, Turn
from rlhf.chat.template import TokenizerTemplate


class ChatFormat(Protocol):
    """Messages to ids and back. UserError (3) for messages that the format cannot hold."""

    name: ClassVar[str]
    """Its value of `model.chat_format`."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a response, the tokenizer's EOS first."""
        ...

    def encode(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Ids of a dialogue that ends with a response, and a mask that is 1 on responses and the tokens that end
        them."""
        ...

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Ids of a dialogue that ends with the user: what the model reads before it responds."""
        ...

    def encode_response(self, messages: Sequence[ChatMessage], response: str) -> list[int]:
        """Ids of a prompt together with one response to it: what a reward model reads."""
        ...

    def validate(self, messages: Sequence[ChatMessage]) -> None:
        """Raises what encoding would, as far as that is known without encoding."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sampled response, up to the first stop id."""
        ...


FORMATS: dict[str, type[Llama2 | TokenizerTemplate]] = {"llama2": Llama2, "tokenizer": TokenizerTemplate}
"""Each has a `template`: its Jinja template in a tokenizer; None: the tokenizer's own."""


PROBE = [Turn("user", "question"), Turn("assistant", "answer"), Turn("user", "more"), Turn("assistant", "end")]


def format_of(tokenizer: Any) -> ChatFormat:
    """The format of the tokenizer's chat template. This is also how an artifact keeps its format."""
    template = getattr(tokenizer, "chat_template", None) or Llama2.template
    return next((known for known in FORMATS.values() if known.template == template), TokenizerTemplate)(tokenizer)


def check_format(chat: ChatFormat) -> None:
    """UserError (3) if the format cannot encode a dialogue of two turns."""
    for length in (2, 4):
        chat.encode(PROBE[:length])

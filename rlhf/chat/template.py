"""The chat format of a tokenizer's own Jinja template. The mask comes from rendered prefixes.

The text before a response is the template's rendering of the messages before it, with its generation prompt. The
response goes from there to the token that ends the turn; whatever the template writes after that token belongs to the
next turn. So the ids are those of `tokenizer.apply_chat_template` up to the end of the last response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from rlhf.chat.messages import ChatMessage, Turn, decode_response, eos_ids, require_last
from rlhf.errors import UserError

REMEDY = "use another template, or set model.chat_format to llama2"
PROBE = [Turn("user", "question"), Turn("assistant", "answer")]


@dataclass(frozen=True)
class TokenizerTemplate:
    """The chat format `tokenizer`. Methods raise UserError (3) for what it cannot hold."""

    tokenizer: Any
    name: ClassVar[str] = "tokenizer"
    template: ClassVar[str | None] = None

    @property
    def stop_ids(self) -> list[int]:
        """EOS ids, and the token that ends an assistant's turn in the template."""
        ends = [] if self._end_id is None else [self._end_id]
        return list(dict.fromkeys([*eos_ids(self.tokenizer), *ends]))

    def encode(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Ids of a dialogue that ends with a response, and a mask that is 1 on each response and the token that ends
        it."""
        prompts, text = self._render_checked(messages)
        ids = self._ids(text)
        mask = [0] * len(ids)
        end = 0
        for number, prompt in enumerate(prompts, 1):
            prompt_ids = self._ids(prompt)
            start = len(prompt_ids)
            if ids[:start] != prompt_ids:
                raise UserError(
                    f"response {number}: the tokenizer merges the end of the prompt with the start of the response, so "
                    "they cannot be told apart; use another tokenizer or drop the row",
                    3,
                )
            end = self._end_of_turn(ids, start)
            mask[start:end] = [1] * (end - start)
        return ids[:end], mask[:end]

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        require_last(messages, "user")
        self._refuse_special_tokens(messages)
        return self._ids(self._render(messages, generation_prompt=True))

    def encode_response(self, messages: Sequence[ChatMessage], response: str) -> list[int]:
        require_last(messages, "user")
        return self.encode([*messages, Turn("assistant", response)])[0]

    def validate(self, messages: Sequence[ChatMessage]) -> None:
        if messages and messages[-1].role == "assistant":
            responses = [message.content for message in messages if message.role == "assistant"]
            if any(text != text.strip() for text in responses):  # with which tokens may merge
                self.encode(messages)
            else:
                self._render_checked(messages)
        else:
            require_last(messages, "user")
            self._refuse_special_tokens(messages)
            self._render(messages, generation_prompt=True)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_response(self.tokenizer, ids, self.stop_ids)

    def _render_checked(self, messages: Sequence[ChatMessage]) -> tuple[list[str], str]:
        """The text before each response, and the whole text; each must be a prefix of it."""
        require_last(messages, "assistant")
        self._refuse_special_tokens(messages)
        text = self._render(messages)
        responses = [place for place, message in enumerate(messages) if message.role == "assistant"]
        prompts = [self._render(messages[:place], generation_prompt=True) for place in responses]
        for number, prompt in enumerate(prompts, 1):
            if not text.startswith(prompt):
                raise UserError(
                    f"response {number} of {len(prompts)}: the chat template renders the messages before it otherwise "
                    f"when the response is there, so it cannot be masked; {REMEDY}",
                    3,
                )
        return prompts, text

    def _render(self, messages: Sequence[ChatMessage], generation_prompt: bool = False) -> str:
        dialogue = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self.tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=generation_prompt)
        except Exception as error:  # Jinja runs what the template's author wrote
            roles = ", ".join(message.role for message in messages)
            raise UserError(f"the chat template refuses messages of the roles {roles}: {error}; {REMEDY}", 3) from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """The place after the token that ends the turn."""
        if self._end_id is None or self._end_id not in ids[start:]:
            raise UserError(
                f"the chat template ends a response with no special token, so no response could end; {REMEDY}", 3
            )
        return ids.index(self._end_id, start) + 1

    def _refuse_special_tokens(self, messages: Sequence[ChatMessage]) -> None:
        for number, message in enumerate(messages, 1):
            if found := self._special.search(message.content):
                raise UserError(
                    f"message {number} ({message.role}) contains {found[0]!r}, a special token of the tokenizer; remove "
                    "it or the row",
                    3,
                )

    @cached_property
    def _special(self) -> re.Pattern[str]:
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _end_id(self) -> int | None:
        """The first special token after the text of a response."""
        try:
            prompt, text = self._render(PROBE[:1], generation_prompt=True), self._render(PROBE)
        except UserError:
            return None
        after = text[len(prompt) :].partition(PROBE[1].content)[2]
        special = set(self.tokenizer.all_special_ids)
        special |= {number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return next((token for token in self._ids(after) if token in special), None)

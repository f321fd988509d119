"""The Llama-2 chat format: messages → token ids and a mask of the response tokens.

Source: Touvron et al. 2023 (arXiv 2307.09288) and the chat code that was published with it. B = BOS, E = EOS:

    closed turn:  B + enc("[INST] {user.strip()} [/INST] {response.strip()} ") + E
    open turn:    B + enc("[INST] {user.strip()} [/INST]")

A system text is put before the first user text, between `<<SYS>>\n` and `\n<</SYS>>\n\n`. All tags are plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from rlhf.chat.messages import ChatMessage, Turn, decode_response, eos_ids, require_last
from rlhf.errors import UserError

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())

# The same format for tools that read `chat_template`; it checks less than the functions below.
TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns, starting with user') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ (bos_token or '') + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


class Exchange(NamedTuple):
    user: str
    answer: str | None  # None: the turn is open


@dataclass(frozen=True)
class Llama2:
    """The chat format `llama2` with the ids of a tokenizer. Methods raise UserError (3) for what it cannot hold."""

    tokenizer: Any
    name: ClassVar[str] = "llama2"
    template: ClassVar[str | None] = TEMPLATE

    @property
    def stop_ids(self) -> list[int]:
        return eos_ids(self.tokenizer)

    def encode(self, messages: Sequence[ChatMessage]) -> tuple[list[int], list[int]]:
        """Ids of a dialogue that ends with a response, and a mask that is 1 on each response, its closing space and its
        EOS.

        UserError (3) for roles out of order, for tags inside a message, and if the tokenizer merges the end of the
        prompt with the start of the response, so that no mask would be right.
        """
        turns = _turns(messages)
        require_last(messages, "assistant")
        return _encode_turns(self.tokenizer, turns)

    def encode_prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        turns = _turns(messages)
        require_last(messages, "user")
        return _encode_turns(self.tokenizer, turns)[0]

    def encode_response(self, messages: Sequence[ChatMessage], response: str) -> list[int]:
        require_last(messages, "user")
        _refuse_tags(response, "the answer")
        return self.encode([*messages, Turn("assistant", response)])[0]

    def validate(self, messages: Sequence[ChatMessage]) -> None:
        validate(messages)

    def decode(self, ids: Sequence[int]) -> str:
        return decode_response(self.tokenizer, ids, self.stop_ids)


def validate(messages: Sequence[ChatMessage]) -> None:
    """UserError (3) for messages that no tokenizer could encode: roles out of order, or tags inside a text."""
    _turns(messages)


def _turns(messages: Sequence[ChatMessage]) -> list[Exchange]:
    """User text and response by turn, with the system text in the first user text."""
    for number, message in enumerate(messages, 1):
        _refuse_tags(message.content, f"message {number} ({message.role})")
    texts = [message.content for message in messages]
    roles = [message.role for message in messages]
    if roles[:2] == ["system", "user"]:
        texts[:2] = [B_SYS + texts[0] + E_SYS + texts[1]]
        del roles[0]
    expected = ["assistant" if position % 2 else "user" for position in range(len(roles))]
    if not roles or roles != expected:
        raise UserError(
            f"the roles are {[message.role for message in messages]}; they must be an optional system message, "
            "then user and assistant in turn, starting with user",
            3,
        )
    answers = [*texts[1::2], None]
    return [Exchange(user, answer) for user, answer in zip(texts[::2], answers, strict=False)]


def _refuse_tags(text: str, where: str) -> None:
    found = next((tag for tag in TAGS if tag in text), None)
    if found:
        raise UserError(f"{where} contains {found!r}, a tag of the chat format itself; remove the tag or the row", 3)


def _encode_turns(tokenizer: Any, turns: list[Exchange]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    for number, turn in enumerate(turns, 1):
        turn_ids, answer_start = _encode_turn(tokenizer, turn, number)
        ids += turn_ids
        mask += [0] * answer_start + [1] * (len(turn_ids) - answer_start)
    return ids, mask


def _encode_turn(tokenizer: Any, turn: Exchange, number: int) -> tuple[list[int], int]:
    """Ids of one turn, and the position of its first response token."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    opening = f"{B_INST} {turn.user.strip()} {E_INST}"
    prompt_ids = _plain_ids(tokenizer, opening)
    answer_start = len(bos) + len(prompt_ids)
    if turn.answer is None:
        return bos + prompt_ids, answer_start
    ids = _plain_ids(tokenizer, f"{opening} {turn.answer.strip()} ")
    if ids[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            f"turn {number}: the tokenizer merges the end of the prompt with the start of the response "
            f"{turn.answer.strip()[:40]!r}, so prompt and response cannot be separated; use another tokenizer or drop "
            "the row",
            3,
        )
    return [*bos, *ids, tokenizer.eos_token_id], answer_start


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text: nothing is added, and a literal `</s>` stays text instead of ending the turn."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

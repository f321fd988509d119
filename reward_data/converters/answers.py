"""A question and its answer under any of the usual names: {prompt, response}, {question, answer}, Dolly's
{instruction, context, response}, OpenOrca's {system_prompt, question, response}.

Also Capybara's `conversation`, a list of {input, output}. A row that is labelled false (KTO) is no demonstration.
"""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import dialogue, field, question, reply, shown, text_of
from reward_data.converters.messages import from_turns
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Demonstration, Message, Record, Role, Tag

QUESTIONS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("response", "answer", "output", "completion")
SPOKEN: tuple[tuple[Role, str], ...] = (("user", "input"), ("assistant", "output"))


def matches(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    answer = _key(value, ANSWERS)  # a number to check an answer against is none
    return isinstance(value.get("conversation"), list) or bool(
        answer and isinstance(value[answer], str) and _key(value, QUESTIONS)
    )


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    if "conversation" in value:
        return [_conversation(value["conversation"], tag, row.place)]
    if value.get("label") in (False, 0, "False", "false", "0"):
        raise BadRow("key 'label' says that this answer is not wanted", "unwanted")
    asked, answer = _key(value, QUESTIONS), _key(value, ANSWERS)
    if asked is None or answer is None:
        raise BadRow(f"needs one of {', '.join(QUESTIONS)} and one of {', '.join(ANSWERS)}")
    return [Demonstration((*asked_of(value, asked), Message("assistant", reply(value, answer))), tag, row.place)]


def asked_of(value: dict[str, Any], key: str) -> tuple[Message, ...]:
    """The prompt under `key`, after a system prompt and before a context, if the row has them."""
    content = field(value, key)
    if key == "question" and isinstance(content, dict):
        content = field(content, "full_text")  # WebGPT
    row = {"system": value.get("system") or value.get("system_prompt"), "history": value.get("history")}
    context = value.get("context") or (value.get("input") if key != "input" else None)
    if isinstance(context, str) and isinstance(content, str):
        return question(row | {"instruction": content, "input": context})
    return question(row | {"prompt": content})


def _key(value: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in value), None)


def _conversation(turns: Any, tag: Tag, place: str) -> Record:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow(f"key 'conversation' must be a list of turns, but is {shown(turns)}")
    if not all("input" in turn for turn in turns):
        return from_turns(turns, "conversation", tag, place)
    spoken = [
        Message(role, text_of(field(turn, key), f"conversation[{n}].{key}"))
        for n, turn in enumerate(turns)
        for role, key in SPOKEN
    ]
    return Demonstration(dialogue(spoken, "conversation", "assistant"), tag, place)

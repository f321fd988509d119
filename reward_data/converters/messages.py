"""Dialogues as messages: {messages: […]} or the bare list; also {prompt, completion} as text or as messages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from reward_data.converters import fields
from reward_data.converters.fields import question, reply_of
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Demonstration, Message, Prompt, Record, Tag


def matches(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict)
    return isinstance(value, dict) and ("messages" in value or {"prompt", "completion"} <= value.keys())


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    if isinstance(value, list):
        return [from_turns(value, "messages", tag, row.place)]
    if "completion" in value:
        return [Demonstration((*question(value), *_completion(value["completion"])), tag, row.place)]
    made = from_turns(fields.field(value, "messages"), "messages", tag, row.place)
    return [replace(made, messages=fields.with_system(value, made.messages))]


def from_turns(turns: Any, key: str, tag: Tag, place: str) -> Demonstration | Prompt:
    """A dialogue that ends with the assistant is a demonstration, one that ends with the user a prompt."""
    if isinstance(turns, list) and turns and fields.message(turns[-1], f"{key}[{len(turns) - 1}]").role == "user":
        return Prompt(fields.messages(turns, key, "user"), tag, place)
    return Demonstration(fields.messages(turns, key, "assistant"), tag, place)


def _completion(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list):
        return (Message("assistant", reply_of(value, "completion")),)
    turns = [fields.message(item, f"completion[{n}]") for n, item in enumerate(value)]
    if len(turns) != 1 or turns[0].role != "assistant":
        raise BadRow("key 'completion' must be one message of the assistant")
    return (Message("assistant", reply_of(turns[0].content, "completion[0]")),)

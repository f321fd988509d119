"""ShareGPT: `conversations`, a list of {from, value}, with an optional `system` text."""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import text
from reward_data.converters.messages import from_turns
from reward_data.files import Row
from reward_data.records import Record, Tag


def matches(value: Any) -> bool:
    return isinstance(value, dict) and "conversations" in value


def convert(row: Row, tag: Tag) -> list[Record]:
    turns = row.value.get("conversations")
    if isinstance(turns, list) and row.value.get("system"):
        turns = [{"from": "system", "value": text(row.value, "system")}, *turns]
    return [from_turns(turns, "conversations", tag, row.place)]

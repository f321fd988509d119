"""Prompts alone: bare strings, or `prompt` as text or messages; whatever else a row holds is left unread."""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import question
from reward_data.files import Row
from reward_data.records import Prompt, Record, Tag


def matches(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "prompt" in value)


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value if isinstance(row.value, dict) else {"prompt": row.value}
    return [Prompt(question(value), tag, row.place)]

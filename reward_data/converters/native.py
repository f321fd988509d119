"""Our own schema as JSON lines: the fields of `reward_data.records`, less `source`."""

from __future__ import annotations

from typing import Any, get_args

from reward_data.converters.fields import messages, reply, shown
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Demonstration, Preference, Prompt, Rating, Record, Safety, Tag


def matches(value: Any) -> bool:
    return isinstance(value, dict) and "tag" in value and ("rating" in value or "messages" in value)


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    tag = _choice(value, "tag", Tag, tag)
    if "chosen" in value:
        return [_preference(row, tag)]
    turns = value.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant":
        return [Demonstration(messages(turns, "messages", "assistant"), tag, row.place)]
    return [Prompt(messages(turns, "messages", "user"), tag, row.place)]


def _preference(row: Row, tag: Tag) -> Preference:
    value = row.value
    return Preference(
        prompt=messages(value.get("prompt"), "prompt", "user"),
        chosen=reply(value, "chosen"),
        rejected=reply(value, "rejected"),
        rating=_choice(value, "rating", Rating, "unrated"),
        tag=tag,
        chosen_safety=_choice(value, "chosen_safety", Safety, "unknown"),
        rejected_safety=_choice(value, "rejected_safety", Safety, "unknown"),
        source=row.place,
    )


def _choice(value: dict[str, Any], key: str, choices: Any, default: Any) -> Any:
    found = value.get(key, default)
    if found not in get_args(choices):
        raise BadRow(f"key '{key}' is {shown(found)}, not one of {', '.join(get_args(choices))}")
    return found

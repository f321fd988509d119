"""Open Assistant message trees: replies to one message are ranked by people, 0 the best.

Every pair of ranked replies of the assistant becomes a preference whose strength is the gap of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from reward_data.converters.fields import dialogue, message, reply, shown
from reward_data.converters.pairs import preference
from reward_data.converters.ratings import from_strength
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message, Record, Tag

NO_RECORD = "no message has two replies of different rank"


def matches(value: Any) -> bool:
    return isinstance(value, dict) and "message_tree_id" in value and isinstance(value.get("prompt"), dict)


def convert(row: Row, tag: Tag) -> list[Record]:
    return list(_pairs(row.value.get("prompt"), "prompt", (), tag, row.place))


def _pairs(node: Any, key: str, before: tuple[Message, ...], tag: Tag, place: str) -> Iterator[Record]:
    """Pairs among the replies to `node`, then among those further down; `before` are the messages that led to it."""
    turns = (*before, message(node, key, "role", "text"))
    replies = _replies(node, key)
    if turns[-1].role == "user":
        prompt = dialogue(turns, key, "user")
        ranked = sorted((child for child in replies if child.get("rank") is not None), key=_rank)
        for best, worst in combinations(ranked, 2):
            if gap := _rank(worst) - _rank(best):
                rating = from_strength(gap, "rank")
                yield preference(prompt, reply(best, "text"), reply(worst, "text"), rating, tag, place)
    for number, child in enumerate(replies):
        yield from _pairs(child, f"{key}.replies[{number}]", turns, tag, place)


def _replies(node: dict[str, Any], key: str) -> list[dict[str, Any]]:
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(child, dict) for child in replies):
        raise BadRow(f"key '{key}.replies' must be a list of messages, but is {shown(replies)}")
    return [child for child in replies if not child.get("deleted")]


def _rank(node: dict[str, Any]) -> int:
    if type(node["rank"]) is not int:
        raise BadRow(f"key 'rank' must be a whole number, but is {shown(node['rank'])}")
    return node["rank"]

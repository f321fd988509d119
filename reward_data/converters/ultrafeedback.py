"""UltraFeedback, binarised: `chosen` and `rejected` dialogues with `score_chosen` and `score_rejected` from 1 to 10.

The rating is the gap of the two scores: under 1 negligibly, under 2 slightly, under 3 better, else significantly.
"""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import field
from reward_data.converters.pairs import both_sides, preference
from reward_data.converters.ratings import from_strength, number
from reward_data.files import Row
from reward_data.records import Record, Tag


def matches(value: Any) -> bool:
    return isinstance(value, dict) and {"chosen", "rejected", "score_chosen", "score_rejected"} <= value.keys()


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    prompt, chosen, rejected = both_sides(value)
    scores = [number(field(value, key), key) for key in ("score_chosen", "score_rejected")]
    return [preference(prompt, chosen, rejected, from_strength(scores[0] - scores[1], "score_chosen"), tag, row.place)]

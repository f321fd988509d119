"""PandaLM's test set (arXiv 2306.05087): two responses and three votes: 1 or 2 for the better one, 0 for a tie.

The lead of the majority is the strength of the rating; a row without a majority makes no pair.
"""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import field, question, reply, shown
from reward_data.converters.pairs import preference
from reward_data.converters.ratings import from_strength
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Record, Tag

NO_RECORD = "no row has a majority for one answer"
VOTES = ("annotator1", "annotator2", "annotator3")


def matches(value: Any) -> bool:
    return isinstance(value, dict) and {"response1", "response2", *VOTES} <= value.keys()


def convert(row: Row, tag: Tag) -> list[Record]:
    prompt = question(row.value)
    first, second = reply(row.value, "response1"), reply(row.value, "response2")
    votes = [field(row.value, key) for key in VOTES]
    for key, vote in zip(VOTES, votes, strict=True):
        if vote not in (0, 1, 2) or isinstance(vote, bool):
            raise BadRow(f"key '{key}' must be 0, 1 or 2, but is {shown(vote)}")
    lead = votes.count(1) - votes.count(2)
    if lead == 0:
        return []
    chosen, rejected = (first, second) if lead > 0 else (second, first)
    return [preference(prompt, chosen, rejected, from_strength(abs(lead), "annotator1"), tag, row.place)]

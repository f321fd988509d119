"""Anthropic HH transcripts, hand-written."""

from __future__ import annotations

from typing import Any

import pytest

from reward_data.converters.hh import convert
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message


def one(value) -> Any:
    (record,) = convert(Row(value, "f:1"), "safety")
    return record


def test_splits_at_the_last_assistant_turn_and_not_at_the_common_prefix():
    record = one({
        "chosen": "\n\nHuman: Do you like me?\n\nAssistant: I like you",
        "rejected": "\n\nHuman: Do you like me?\n\nAssistant: I hate you",
    })  # fmt: skip
    assert record.prompt == (Message("user", "Do you like me?"),)
    assert (record.chosen, record.rejected) == ("I like you", "I hate you")
    assert (record.rating, record.tag, record.source) == ("unrated", "safety", "f:1")


def test_keeps_every_turn_of_a_dialogue():
    start = "\n\nHuman: One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant:"
    record = one({"chosen": start + " Four.", "rejected": start + " Five."})
    roles = [(m.role, m.content) for m in record.prompt]
    assert roles == [("user", "One?"), ("assistant", "Two."), ("user", "Three?")]


def test_joins_two_turns_of_one_speaker():
    start = "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    record = one({"chosen": start + " e", "rejected": start + " f"})
    assert [m.content for m in record.prompt] == ["a", "b\n\nc", "d"]


def test_reads_a_transcript_as_prompt():
    record = one({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " What?"})
    assert (record.prompt, record.chosen) == ((Message("user", "Hi"),), "Hello!")


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind", "reason"),
    [
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: A\n\nAssistant: c", "unequal_prompts", "two different prompts"),
        ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "empty_reply", "'rejected' is an empty reply"),
        ("\n\nHuman: a\n\nAssistant: \n", "\n\nHuman: a\n\nAssistant: b", "empty_reply", "'chosen' is an empty reply"),
        ("\n\nHuman: a", "\n\nHuman: a\n\nAssistant: b", "bad_row", "'chosen' has no"),
        ("\n\nHuman: a\n\nAssistant: b", 3, "bad_row", "'rejected' must be text, but is 3"),
        ("Hm\n\nAssistant: b", "Hm\n\nAssistant: c", "bad_row", "does not begin with"),
        ("\n\nHuman:\n\nAssistant: b", "\n\nHuman:\n\nAssistant: c", "empty_prompt", "is empty"),
    ],
)
def test_refuses(chosen, rejected, kind, reason):
    with pytest.raises(BadRow, match=reason) as bad:
        one({"chosen": chosen, "rejected": rejected})
    assert bad.value.kind == kind

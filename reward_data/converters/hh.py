r"""Anthropic HH (arXiv 2204.05862): two transcripts `\n\nHuman: … \n\nAssistant: …` that differ in the last reply.

The prompt ends at the last `\n\nAssistant:`, not where the two texts begin to differ. Rows whose two prompts differ,
or with an empty reply, are bad rows. Also read: {prompt, chosen, rejected} with the transcript as prompt.
"""

from __future__ import annotations

import re
from typing import Any

from reward_data.converters.fields import dialogue, reply, reply_of, text
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message, Preference, Record, Tag

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def matches(value: Any) -> bool:
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        return False
    first = value["prompt"] if "prompt" in value else value["chosen"]
    return isinstance(first, str) and first.startswith(HUMAN)


def convert(row: Row, tag: Tag) -> list[Record]:
    if "prompt" in row.value:
        transcript = text(row.value, "prompt")
        prompt = transcript.rsplit(ASSISTANT, 1)[0] if transcript.rstrip().endswith(ASSISTANT) else transcript
        chosen, rejected = reply(row.value, "chosen"), reply(row.value, "rejected")
        key = "prompt"
    else:
        prompt, chosen = _split(text(row.value, "chosen"), "chosen")
        other, rejected = _split(text(row.value, "rejected"), "rejected")
        key = "chosen"
        if prompt != other:
            raise BadRow("keys 'chosen' and 'rejected' answer two different prompts", "unequal_prompts")
    turns = _turns(prompt, key)
    return [Preference(turns, chosen.strip(), rejected.strip(), "unrated", tag, "unknown", "unknown", row.place)]


def _split(transcript: str, key: str) -> tuple[str, str]:
    prompt, mark, answer = transcript.rpartition(ASSISTANT)
    if not mark:
        raise BadRow(f"key '{key}' has no '\\n\\nAssistant:' turn")
    return prompt, reply_of(answer, key)


def _turns(transcript: str, key: str) -> tuple[Message, ...]:
    """Turns of the transcript. A few have one side speak twice: those turns are joined."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)
    if parts[0].strip():
        raise BadRow(f"key '{key}' does not begin with '\\n\\nHuman:'")
    turns: list[Message] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if turns and turns[-1].role == role:
            joined = f"{turns.pop().content}\n\n{content.strip()}".strip()
            turns.append(Message(role, joined))
        else:
            turns.append(Message(role, content.strip()))
    return dialogue(turns, key, "user")

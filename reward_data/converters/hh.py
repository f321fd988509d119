r"""Anthropic HH (arXiv 2204.05862): two transcripts `\n\nHuman: … \n\nAssistant: …` that differ in the last reply.

The prompt ends at the last `\n\nAssistant:`, not where the two texts begin to differ. Rows whose two prompts differ,
or with an empty reply, are bad rows. Also read: {prompt, chosen, rejected} with the transcript as prompt.
"""

from __future__ import annotations

from typing import Any

from reward_data.converters.fields import TRANSCRIPT, reply, reply_of, spoken, text, with_system
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Preference, Record, Tag

ASSISTANT = "\n\nAssistant:"
SPLIT_KEYS = ("prompt",)  # its text is cut into turns


def matches(value: Any) -> bool:
    if not isinstance(value, dict) or not {"chosen", "rejected"} <= value.keys():
        return False
    first = value["prompt"] if "prompt" in value else value["chosen"]
    return isinstance(first, str) and first.lstrip().startswith("Human:") and ("prompt" in value or ASSISTANT in first)


def convert(row: Row, tag: Tag) -> list[Record]:
    if "prompt" in row.value:
        transcript = text(row.value, "prompt")
        prompt = transcript.rsplit(ASSISTANT, 1)[0] if transcript.rstrip().endswith(ASSISTANT) else transcript
        chosen, rejected = (_without(transcript, reply(row.value, key), key) for key in ("chosen", "rejected"))
        key = "prompt"
    else:
        prompt, chosen = _split(text(row.value, "chosen"), "chosen")
        other, rejected = _split(text(row.value, "rejected"), "rejected")
        key = "chosen"
        if prompt != other:
            raise BadRow("keys 'chosen' and 'rejected' answer two different prompts", "unequal_prompts")
    turns = with_system(row.value, spoken(prompt, key))
    return [Preference(turns, chosen.strip(), rejected.strip(), "unrated", tag, "unknown", "unknown", row.place)]


def _without(transcript: str, answer: str, key: str) -> str:
    """The answer less the transcript, where it repeats that before it goes on."""
    if not TRANSCRIPT.match(transcript) or not answer.strip().startswith(transcript.strip()):
        return _last(answer, key)
    return _last(answer.strip().removeprefix(transcript.strip()), key)


def _last(answer: str, key: str) -> str:
    if "\n\nHuman:" in answer:
        raise BadRow(
            f"key '{key}' ends with a turn of the human, '\\n\\nHuman:'; it must end with the assistant's answer"
        )
    return reply_of(answer, key)


def _split(transcript: str, key: str) -> tuple[str, str]:
    prompt, mark, answer = transcript.rpartition(ASSISTANT)
    if not mark:
        raise BadRow(f"key '{key}' has no '\\n\\nAssistant:' turn")
    if "\n\nHuman:" in answer:
        raise BadRow(
            f"key '{key}' ends with a turn of the human, '\\n\\nHuman:'; it must end with the assistant's answer"
        )
    return prompt, reply_of(answer, key)

"""Records for the tests of this folder, and their JSON lines."""

import json

from reward_data import Demonstration, Message, Preference
from reward_data.records import Rating, Safety, Tag


def asked(text):
    return (Message("user", text),)


def demonstration(text, answer="yes", source="d.jsonl:1"):
    return Demonstration((*asked(text), Message("assistant", answer)), "helpful", source)


def preference(
    text: str,
    chosen: str = "yes",
    rejected: str = "no",
    rating: Rating = "better",
    tag: Tag = "helpful",
    safety: tuple[Safety, Safety] = ("safe", "safe"),
) -> Preference:
    return Preference(asked(text), chosen, rejected, rating, tag, *safety, source="p.jsonl:1")


def written(rows):
    """Records in the project's own form, one JSON line each."""

    def turns(messages):
        return [vars(message) for message in messages]

    lines = []
    for row in rows:
        value = {key: field for key, field in vars(row).items() if key != "source"}
        value |= {key: turns(value[key]) for key in ("prompt", "messages") if key in value}
        lines.append(json.dumps(value) + "\n")
    return "".join(lines)

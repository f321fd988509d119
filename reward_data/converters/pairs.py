"""Pairs with a prompt of their own (explicit) or inside both answers (implicit), as text or as messages.

- `prompt`, `messages`, `conversations` or `instruction` + `input`, then `chosen` and `rejected`: text, one message, a
  list with the answer alone, or the whole dialogue. Where the dialogues hold the prompt, the two must agree on it.
- `output: [best, …, worst]`: every pair of the ranking; the gap of ranks is the strength.
- `strength` or `preference_strength` gives the rating: 0 negligibly, 1 slightly, 2 better, 3 and more significantly.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

from reward_data.converters.fields import dialogue, field, history, message, question, reply_of, shown, with_system
from reward_data.converters.ratings import from_strength
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message, Preference, Rating, Record, Tag

STRENGTHS = ("strength", "preference_strength")
PROMPTS = ("prompt", "messages", "conversations", "instruction")


def matches(value: Any) -> bool:
    return isinstance(value, dict) and ({"chosen", "rejected"} <= value.keys() or isinstance(value.get("output"), list))


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    if "chosen" not in value and isinstance(value.get("output"), list):
        return _ranking(row, tag)
    key = next((key for key in STRENGTHS if value.get(key) is not None), None)
    rating = from_strength(value[key], key) if key else "unrated"
    prompt, chosen, rejected = both_sides(value)
    return [preference(prompt, chosen, rejected, rating, tag, row.place)]


def preference(
    prompt: tuple[Message, ...], chosen: str, rejected: str, rating: Rating, tag: Tag, place: str
) -> Preference:
    """A preference of a source that says nothing about the safety of the answers."""
    return Preference(prompt, chosen, rejected, rating, tag, "unknown", "unknown", place)


def both_sides(value: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str]:
    """Prompt, chosen and rejected answer of a row."""
    before, chosen = _side(value, "chosen")
    other, rejected = _side(value, "rejected")
    if before != other:
        raise BadRow("keys 'chosen' and 'rejected' answer two different prompts", "unequal_prompts")
    if before:
        return _with_context(value, dialogue(before, "chosen", "user")), chosen, rejected
    if not any(key in value for key in PROMPTS):
        raise BadRow(f"no prompt: give one of {', '.join(PROMPTS)}, or the whole dialogue as 'chosen' and 'rejected'")
    return question(value), chosen, rejected


def _with_context(value: Mapping[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The dialogue of the answers, after the history and the system message that the row holds beside it."""
    given = [*history(value), *turns]
    known = {turn.content for turn in turns}
    if all(turn.content in known for turn in history(value)):
        given = list(turns)
    elif turns[0].role == "system":
        given = [turns[0], *history(value), *turns[1:]]
    told = value.get("prompt")
    first = message(told[0], "prompt[0]") if isinstance(told, list) and told else None
    if first is not None and first.role == "system" and turns[0].role != "system":
        given.insert(0, first)
    return with_system(value, dialogue(given, "chosen", "user"))


def _side(value: Mapping[str, Any], key: str) -> tuple[list[Message], str]:
    """Messages before the answer, if the field holds them, and the answer."""
    side = field(value, key)
    if isinstance(side, Mapping):
        side = [side]
    if not isinstance(side, list):
        return [], reply_of(side, key)
    turns = [message(item, f"{key}[{n}]") for n, item in enumerate(side)]
    if not turns or turns[-1].role != "assistant":
        raise BadRow(f"key '{key}' must end with a turn of the assistant")
    return turns[:-1], reply_of(turns[-1].content, f"{key}[{len(turns) - 1}]")


def _ranking(row: Row, tag: Tag) -> list[Record]:
    outputs = row.value["output"]
    if len(outputs) < 2:
        raise BadRow(f"key 'output' must rank two answers or more, but is {shown(outputs)}")
    answers = [reply_of(answer, f"output[{n}]") for n, answer in enumerate(outputs)]
    prompt = question(row.value)
    return [
        preference(prompt, answers[best], answers[worst], from_strength(worst - best, "output"), tag, row.place)
        for best, worst in combinations(range(len(answers)), 2)
    ]

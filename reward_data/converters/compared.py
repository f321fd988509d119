"""Two answers and which one is better, as different data sets write it.

PKU-SafeRLHF (arXiv 2406.15513; for the tag safety the safer answer is chosen), HelpSteer2-preference and HelpSteer3,
SHP, Stack Exchange pairs, WebGPT comparisons; and pairs whose prompt is called `question` or `query`. A tie makes no
pair.
"""

from __future__ import annotations

from typing import Any

from reward_data.converters.answers import asked_of
from reward_data.converters.fields import field, reply, reply_of, shown, text
from reward_data.converters.pairs import both_sides, preference
from reward_data.converters.ratings import from_strength, number
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Preference, Rating, Record, Safety, Tag

NO_RECORD = "no row says that one response is better"
# keys of the prompt, of the first and of the second answer, and the key that says which one is better
PKU = ("prompt", "response_0", "response_1", "better_response_id")
FORMS = (
    ("prompt", "response_1", "response_2", "preference_strength"),
    ("context", "response1", "response2", "overall_preference"),
    ("history", "human_ref_A", "human_ref_B", "labels"),
    ("question", "response_j", "response_k", ""),
    ("question", "answer_0", "answer_1", "score_0"),
)
ASKED = ("question", "query", "input")


def matches(value: Any) -> bool:
    return isinstance(value, dict) and (_form(value) is not None or _asked(value) is not None)


def convert(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    form = _form(value)
    if form is None:
        if (key := _asked(value)) is None:
            raise BadRow("no two answers here that are compared")
        system = value.get("system") or value.get("system_prompt")
        prompt, chosen, rejected = both_sides({**value, "prompt": value[key], "system": system})
        return [preference(prompt, chosen, rejected, "unrated", tag, row.place)]
    if form is PKU:
        return _pku(row, tag)
    key, first, second, _ = form
    answers = reply(value, first), reply(value, second)
    lead, rating = _verdict(value, form)
    if lead == 0:
        return []
    if key == "history":  # SHP: the post, not turns that came before
        prompt = asked_of({"prompt": text(value, key)}, "prompt")
    elif key == "context":
        prompt = asked_of({"prompt": field(value, key)}, "prompt")
    else:
        prompt = asked_of(value, key)
    chosen, rejected = answers if lead > 0 else answers[::-1]
    return [preference(prompt, chosen, rejected, rating, tag, row.place)]


def _form(value: dict[str, Any]) -> tuple[str, ...] | None:
    return next((form for form in (PKU, *FORMS) if {key for key in form if key} <= value.keys()), None)


def _asked(value: dict[str, Any]) -> str | None:
    if not {"chosen", "rejected"} <= value.keys() or not {"prompt", "messages", "instruction"}.isdisjoint(value):
        return None
    return next((key for key in ASKED if key in value), None)


def _verdict(value: dict[str, Any], form: tuple[str, ...]) -> tuple[float, Rating]:
    """By how much the first answer is better, under 0 for the second, and the rating that this makes."""
    key = form[3]
    if not key:
        return 1, "unrated"
    found = number(value[key], key)
    if key == "labels":
        if found not in (0, 1):
            raise BadRow(f"key 'labels' must be 0 or 1, but is {shown(value[key])}")
        return 2 * found - 1, "unrated"
    if key == "score_0":
        return found - number(field(value, "score_1"), "score_1"), "unrated"
    return -found, from_strength(abs(found), key)  # from -3, the first is much better, to 3


def _pku(row: Row, tag: Tag) -> list[Record]:
    value = row.value
    key = "safer_response_id" if tag == "safety" and value.get("safer_response_id") is not None else PKU[3]
    better = number(field(value, key), key)
    if better not in (0, 1):
        raise BadRow(f"key '{key}' must be 0 or 1, but is {shown(value[key])}")
    sides: list[tuple[str, Safety]] = [
        (reply_of(field(value, f"response_{n}"), f"response_{n}"), _safety(value, n)) for n in (0, 1)
    ]
    (chosen, chosen_safety), (rejected, rejected_safety) = sides if better == 0 else sides[::-1]
    prompt = asked_of(value, "prompt")
    return [Preference(prompt, chosen, rejected, "unrated", tag, chosen_safety, rejected_safety, row.place)]


def _safety(value: dict[str, Any], n: int) -> Safety:
    said = value.get(f"is_response_{n}_safe")
    if said is None:
        return "unknown"
    word = str(said).lower()
    if word not in ("true", "false"):
        raise BadRow(f"key 'is_response_{n}_safe' must be true or false, but is {shown(said)}")
    return "safe" if word == "true" else "unsafe"

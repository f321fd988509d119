"""Several answers to one prompt, ranked or scored: Nectar, UltraFeedback as published, Stack Exchange preferences.

Every pair of unequal answers becomes a preference; the gap of ranks or scores is its strength.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from reward_data.converters.answers import asked_of
from reward_data.converters.fields import field, reply, shown, spoken
from reward_data.converters.hh import ASSISTANT
from reward_data.converters.pairs import preference
from reward_data.converters.ratings import from_strength, number
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message, Record, Tag

NO_RECORD = "no row has two responses of different rank or score"
# key of the list, of an answer's text, of its rank or score, and whether more is better
FORMS = (
    ("answers", "answer", "rank", False),
    ("completions", "response", "overall_score", True),
    ("answers", "text", "pm_score", True),
)
ASKED = ("prompt", "instruction", "question")


def matches(value: Any) -> bool:
    return isinstance(value, dict) and _form(value) is not None and any(key in value for key in ASKED)


def convert(row: Row, tag: Tag) -> list[Record]:
    form = _form(row.value)
    key = next((key for key in ASKED if key in row.value), None)
    if form is None or key is None:
        raise BadRow("no ranked answers here: needs 'answers' with 'rank' or 'pm_score', or 'completions' with scores")
    items, text, grade, more = form
    prompt = _prompt(row.value, key)
    graded = []
    for answer in row.value[items]:
        if not isinstance(answer, dict):
            raise BadRow(f"key '{items}' must be a list of objects, but holds {shown(answer)}")
        value = number(field(answer, grade), grade)
        graded.append((value if more else -value, reply(answer, text)))
    made: list[Record] = []
    for pair in combinations(graded, 2):
        (best, chosen), (worst, rejected) = sorted(pair, key=lambda side: -side[0])
        if best > worst:
            made.append(preference(prompt, chosen, rejected, from_strength(best - worst, grade), tag, row.place))
    return made


def _prompt(value: dict[str, Any], key: str) -> tuple[Message, ...]:
    content = value[key]
    if isinstance(content, str) and content.lstrip().startswith("Human:"):
        return spoken(content.rsplit(ASSISTANT, 1)[0] if content.rstrip().endswith(ASSISTANT) else content, key)
    return asked_of(value, key)


def _form(value: dict[str, Any]) -> tuple[str, str, str, bool] | None:
    for form in FORMS:
        items = value.get(form[0])
        if isinstance(items, list) and items and isinstance(items[0], dict) and {form[1], form[2]} <= items[0].keys():
            return form
    return None

r"""HelpSteer and HelpSteer2 (arXiv 2311.09528, 2406.08673): one answer a row, graded 0 to 4 for `helpfulness` and more.

Rows with the same prompt, wherever they stand, become pairs wherever their helpfulness differs; the gap is the strength of the
rating (1 slightly, 2 better, 3 and more significantly). Prompts of several turns are marked inside the text with
`<extra_id_1>Assistant` and `<extra_id_1>User`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

from reward_data.converters.fields import dialogue, field, prompt_text, reply, shown
from reward_data.converters.pairs import preference
from reward_data.converters.ratings import from_strength, number
from reward_data.errors import BadRow
from reward_data.files import Row
from reward_data.records import Message, Record, Tag

SPLIT_KEYS = ("prompt",)  # its text is cut into turns
NO_RECORD = "no two answers to one prompt differ in helpfulness"


def matches(value: Any) -> bool:
    return isinstance(value, dict) and {"prompt", "response", "helpfulness"} <= value.keys()


def group(rows: list[Row]) -> Iterator[Row]:
    """Rows that answer one prompt, wherever they stand, as one row, whose value is the list of them; a bad one stands alone."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        same.setdefault(str(row.value.get("prompt")) if _is_whole(row) else f"\0{row.place}", []).append(row)
    for rows_of_prompt in same.values():
        yield Row(rows_of_prompt, rows_of_prompt[0].place)


def _is_whole(row: Row) -> bool:
    try:
        _answer(row)
    except BadRow:
        return False
    return True


def convert(row: Row, tag: Tag) -> list[Record]:
    answers = [_answer(one) for one in row.value]
    turns = _turns(prompt_text(row.value[0].value, "prompt"))
    made: list[Record] = []
    for (one, place), (other, _) in combinations(answers, 2):
        (better, chosen), (worse, rejected) = sorted((one, other), reverse=True)
        if better > worse:
            made.append(preference(turns, chosen, rejected, from_strength(better - worse, "helpfulness"), tag, place))
    return made


def _answer(row: Row) -> tuple[tuple[float, str], str]:
    try:
        if row.fault:
            raise BadRow(row.fault)
        if not isinstance(row.value, dict):
            raise BadRow(f"the row is {shown(row.value)}, not an object with keys")
        return (number(field(row.value, "helpfulness"), "helpfulness"), reply(row.value, "response")), row.place
    except BadRow as bad:
        bad.place = row.place
        raise


def _turns(prompt: str) -> tuple[Message, ...]:
    first, *rest = re.split(r"\n?<extra_id_1>(Assistant|User)\n", prompt)
    turns = [Message("user", first)]
    for speaker, content in zip(rest[::2], rest[1::2], strict=True):
        turns.append(Message("user" if speaker == "User" else "assistant", content))
    return dialogue(turns, "prompt", "user")

"""One module per source form: `matches(value)` tells the form by a row's keys, `convert(row, tag)` makes records.

`convert` raises BadRow for a row that cannot be used. The record that it makes is the fullest that the row holds;
`load` derives the rest: a preference is also a demonstration (its chosen answer), and both hold a prompt.
"""

from __future__ import annotations

from collections import Counter
from types import ModuleType

from reward_data.converters import (
    alpaca,
    answers,
    compared,
    helpsteer,
    hh,
    messages,
    native,
    oasst,
    pairs,
    pandalm,
    prompts,
    ranked,
    sharegpt,
    ultrafeedback,
)
from reward_data.converters.fields import shown
from reward_data.errors import DataError
from reward_data.files import Row

FORMATS: dict[str, ModuleType] = {  # in the order of detection
    "native": native,
    "hh": hh,
    "ultrafeedback": ultrafeedback,
    "helpsteer": helpsteer,
    "oasst": oasst,
    "pandalm": pandalm,
    "compared": compared,
    "ranked": ranked,
    "pairs": pairs,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "messages": messages,
    "answers": answers,
    "prompts": prompts,
}


DETECTED = 1000  # rows of a file that tell its form


def converter_for(format: str, first: Row) -> ModuleType:
    """The converter named `format`; for `auto` the first one that knows the form of the row."""
    if format != "auto":
        if format not in FORMATS:
            raise DataError(f"unknown format {format!r}; known: auto, {', '.join(FORMATS)}")
        return FORMATS[format]
    if first.fault and not isinstance(first.value, dict):
        raise DataError(f"{first.place}: no row of the file can be read; this one: {first.fault}")
    name = _name_of(first)
    if name is None:
        raise DataError(
            f"{first.place}: cannot tell the format of {_look(first)}; name its columns (columns: {{prompt: …, "
            "chosen: …, rejected: …}, or prompt and completion), or convert to pairs: {prompt, chosen, rejected}; "
            f"formats that are read: {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def form_of(rows: list[Row]) -> Row:
    """A row of the form that most rows have: the first may be the broken one."""
    names = {row.place: name for row in rows[:DETECTED] if (name := _name_of(row))}
    if not names:
        return next((row for row in rows if not row.fault), rows[0])
    most = Counter(names.values()).most_common(1)[0][0]
    return next(row for row in rows if names.get(row.place) == most)


def _name_of(row: Row) -> str | None:
    if row.fault:
        return None
    return next((name for name, converter in FORMATS.items() if converter.matches(row.value)), None)


def _look(row: Row) -> str:
    if isinstance(row.value, dict):
        return f"a row with the keys {', '.join(map(str, row.value))}"
    return f"a row that is {shown(row.value)}"

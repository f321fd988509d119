"""One module per source form: `matches(value)` tells the form by a row's keys, `convert(row, tag)` makes records.

`convert` raises BadRow for a row that cannot be used. The record that it makes is the fullest that the row holds;
`load` derives the rest: a preference is also a demonstration (its chosen answer), and both hold a prompt.
"""

from __future__ import annotations

from types import ModuleType

from reward_data.converters import (
    alpaca,
    helpsteer,
    hh,
    messages,
    native,
    oasst,
    pairs,
    pandalm,
    prompts,
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
    "pairs": pairs,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "messages": messages,
    "prompts": prompts,
}


def converter_for(format: str, first: Row) -> ModuleType:
    """The converter named `format`; for `auto` the first one that knows the form of the first row."""
    if format != "auto":
        if format not in FORMATS:
            raise DataError(f"unknown format {format!r}; known: auto, {', '.join(FORMATS)}")
        return FORMATS[format]
    for converter in FORMATS.values():
        if not first.fault and converter.matches(first.value):
            return converter
    raise DataError(f"{first.place}: cannot tell the format of {_look(first)}; name one of {', '.join(FORMATS)}")


def _look(row: Row) -> str:
    if isinstance(row.value, dict):
        return f"a row with the keys {', '.join(map(str, row.value))}"
    return f"a row that is {row.fault or shown(row.value)}"

"""A row as the file holds it, before anyone asks what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    value: Any
    place: str  # "file:line", or "file:row" for Parquet and Arrow, both counted from 1
    fault: str = ""  # why the row could not even be parsed


MOST_CHARACTERS = 10_000_000  # in a row; a response of a million tokens has about four million


def too_long(characters: int) -> str:
    """Why a row cannot be used, "" if it is short enough."""
    if characters <= MOST_CHARACTERS:
        return ""
    return f"the row has {characters:,} characters, and {MOST_CHARACTERS:,} are the most; is this a broken file?"

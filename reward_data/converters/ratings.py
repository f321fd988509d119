"""Strengths of other data sets as our four ratings."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from reward_data.converters.fields import shown
from reward_data.errors import BadRow
from reward_data.records import Rating

_BY_STRENGTH: tuple[Rating, ...] = ("negligibly", "slightly", "better", "significantly")
LARGEST = 1e300


def from_strength(strength: Any, key: str) -> Rating:
    """0 negligibly, 1 slightly, 2 better, 3 and more significantly: a graded vote, a gap of ranks, a gap of scores."""
    if (found := number(strength, key)) < 0:
        raise BadRow(f"key '{key}' must be a number from 0, but is {shown(strength)}")
    return _BY_STRENGTH[int(min(3, found))]


def number(value: Any, key: str) -> float:
    """The number, also where it stands in quotation marks."""
    found = value
    if isinstance(value, str):
        with suppress(ValueError):
            found = float(value)
    if not is_number(found):
        raise BadRow(f"key '{key}' must be a number, but is {shown(value)}")
    return found


def is_number(value: Any) -> bool:
    """Neither NaN nor infinite, nor so large that it is no float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST

"""Strengths of other data sets as our four ratings."""

from __future__ import annotations

import math
from typing import Any

from reward_data.converters.fields import shown
from reward_data.errors import BadRow
from reward_data.records import Rating

_BY_STRENGTH: tuple[Rating, ...] = ("negligibly", "slightly", "better", "significantly")


def from_strength(strength: Any, key: str) -> Rating:
    """0 negligibly, 1 slightly, 2 better, 3 and more significantly: a graded vote, a gap of ranks, a gap of scores."""
    if not is_number(strength) or strength < 0:
        raise BadRow(f"key '{key}' must be a number from 0, but is {shown(strength)}")
    return _BY_STRENGTH[min(3, int(strength))]


def number(value: Any, key: str) -> float:
    if not is_number(value):
        raise BadRow(f"key '{key}' must be a number, but is {shown(value)}")
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)

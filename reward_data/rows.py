"""A row as the file holds it, before anyone asks what it means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    value: Any
    place: str  # "file:line", or "file:row" for Parquet and Arrow, both counted from 1
    fault: str = ""  # why the row could not even be parsed

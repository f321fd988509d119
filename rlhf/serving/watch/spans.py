"""Times such as 30m, 24h and 7d."""

from __future__ import annotations

import re

UNITS = {"m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> float:
    """30m, 1h, 7d. ValueError for anything else."""
    if not (parts := re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text.strip())) or float(parts[1]) <= 0:
        raise ValueError(f"{text!r} is no time: write 30m, 1h or 7d")
    return float(parts[1]) * UNITS[parts[2]]


def shown(span: float) -> str:
    unit = next((unit for unit in "dhm" if span >= UNITS[unit] and span % UNITS[unit] == 0), None)
    return f"{span / UNITS[unit]:g}{unit}" if unit else f"{span:g}s"

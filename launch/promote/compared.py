"""What a comparison tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.evaluation.gate import Check

CANDIDATE, CHAMPION = "candidate", "champion"


@dataclass(frozen=True)
class Compared:
    checks: Sequence[Check]
    on: str  # "448 prompts"
    notes: Sequence[str]  # what was left out, for people

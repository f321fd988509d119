"""Common faults of data, found and counted, so that a run can report or refuse them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from reward_data.records import Demonstration, Preference, Record, normalised_prompt, prompt_of

FindingKind = Literal["identical_pair", "empty_reply", "shared_prompt"]
EXAMPLES = 5


@dataclass(frozen=True)
class Finding:
    kind: FindingKind
    count: int
    examples: tuple[str, ...]  # "file:line" of the first few


def check(train: Sequence[Record], held_out: Sequence[Record] = ()) -> list[Finding]:
    """Findings over both parts: identical pairs, empty replies, and training rows whose prompt is also held out.

    Case and white space of prompts are ignored. A record cannot hold two different prompts: `load` refuses such rows and
    counts them in `Loaded.refused_kinds`.
    """
    everything = [*train, *held_out]
    known = {normalised_prompt(prompt_of(record)) for record in held_out}
    findings = [
        _finding("identical_pair", everything, _is_identical_pair),
        _finding("empty_reply", everything, _has_empty_reply),
        _finding("shared_prompt", train, lambda record: normalised_prompt(prompt_of(record)) in known),
    ]
    return [finding for finding in findings if finding.count]


def _finding(kind: FindingKind, records: Iterable[Record], is_so: Callable[[Record], bool]) -> Finding:
    places = [record.source for record in records if is_so(record)]
    return Finding(kind, len(places), tuple(places[:EXAMPLES]))


def _is_identical_pair(record: Record) -> bool:
    return isinstance(record, Preference) and record.chosen.strip() == record.rejected.strip()


def _has_empty_reply(record: Record) -> bool:
    if isinstance(record, Preference):
        return not (record.chosen.strip() and record.rejected.strip())
    return isinstance(record, Demonstration) and not record.messages[-1].content.strip()

"""The three kinds of records for training: demonstrations, preferences, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Rating = Literal["significantly", "better", "slightly", "negligibly", "unrated"]
"""By how much the chosen response is better; the four grades of Llama 2 (arXiv 2307.09288, §3.2.1)."""
Tag = Literal["helpful", "safety"]
Safety = Literal["safe", "unsafe", "unknown"]
Kind = Literal["demonstrations", "preferences", "prompts", "answers"]
"""`answers` are demonstrations that are only scored, so those that people rejected are included."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Demonstration:
    messages: tuple[Message, ...]  # ends with the assistant
    tag: Tag
    source: str  # "file:line"


@dataclass(frozen=True)
class Preference:
    prompt: tuple[Message, ...]  # ends with the user
    chosen: str
    rejected: str
    rating: Rating
    tag: Tag
    chosen_safety: Safety
    rejected_safety: Safety
    source: str  # "file:line"


@dataclass(frozen=True)
class Prompt:
    messages: tuple[Message, ...]  # ends with the user
    tag: Tag
    source: str  # "file:line"
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)  # whatever else its row holds


Record = Demonstration | Preference | Prompt


def prompt_of(record: Record) -> tuple[Message, ...]:
    """The messages that the response of this record replies to."""
    if isinstance(record, Preference):
        return record.prompt
    return record.messages[:-1] if isinstance(record, Demonstration) else record.messages


def normalised_prompt(messages: Sequence[Message]) -> str:
    """One text for prompts that differ only in case and white space, to find records with the same prompt."""
    return "\n".join(f"{m.role}: {' '.join(m.content.lower().split())}" for m in messages)

"""The tables, and their rows as they come in. Times are seconds since 1970."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import JSON, Column, Float, ForeignKey, Integer, MetaData, String, Table, Text

Rating = Literal["significantly", "better", "slightly", "negligibly"]
"""By how much one response is better; the last one is also "unsure"."""
Label = Literal["helpful", "safe", "unsafe"]
LONGEST_ID, LONGEST_NAME = 64, 200

metadata = MetaData()


def _exchange(name: str, **options: Any) -> Column:
    return Column(name, ForeignKey("exchanges.id", ondelete="CASCADE"), index=True, **options)


users = Table(
    "users",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(LONGEST_NAME), nullable=False, unique=True),
    Column("created", Float, nullable=False),
)
exchanges = Table(
    "exchanges",
    metadata,
    Column("id", String(LONGEST_ID), primary_key=True),
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), index=True),
    Column("kind", String(16), nullable=False),
    Column("model", Text, nullable=False),
    Column("digest", String(64)),
    Column("version", Text),
    Column("messages", JSON, nullable=False),
    Column("response", Text, nullable=False),
    Column("finish", String(16), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("first_token_s", Float),
    Column("sampling", JSON, nullable=False),
    Column("created", Float, nullable=False, index=True),
)
scores = Table(
    "scores",
    metadata,
    Column("id", Integer, primary_key=True),
    _exchange("exchange_id", nullable=False),
    Column("name", Text, nullable=False),
    Column("value", Float),
    Column("raw", Float),
    Column("digest", String(64)),
    Column("created", Float, nullable=False),
)
votes = Table(
    "votes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("user_id", ForeignKey("users.id", ondelete="CASCADE"), index=True),
    _exchange("first", nullable=False),
    _exchange("second"),
    Column("chosen", String(8)),
    Column("rating", String(16)),
    Column("thumb", String(8)),
    Column("edit", Text),
    Column("labels", JSON, nullable=False),
    Column("created", Float, nullable=False),
)
alarms = Table(
    "alarms",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("rule", Text, nullable=False),
    Column("value", Float, nullable=False),
    Column("low", Float),
    Column("high", Float),
    Column("n", Integer, nullable=False),
    Column("began", Float, nullable=False, index=True),
    Column("ended", Float),
)


@dataclass(frozen=True)
class Exchange:
    id: str
    kind: str
    model: str
    digest: str | None
    """Of the artifact that responded."""
    messages: Sequence[Mapping[str, str]]
    response: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    sampling: Mapping[str, Any]
    version: str | None = None
    """Of the registry: models:/NAME/3."""
    first_token_s: float | None = None
    """From the request to its first token."""
    user: str | None = None
    created: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Score:
    """What a reward model says of a response."""

    exchange_id: str
    name: str
    value: float | None
    """None: the model cannot read this response."""
    raw: float | None = None
    """The logit before the mean over SFT responses is subtracted."""
    digest: str | None = None
    """Of the reward model."""
    created: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Vote:
    """About one exchange, or about two responses to one prompt in the order in which they were shown."""

    first: str
    second: str | None = None
    chosen: Literal["first", "second"] | None = None
    rating: Rating | None = None
    thumb: Literal["up", "down"] | None = None
    edit: str | None = None
    """The first response as the person would have it."""
    labels: Mapping[str, Sequence[Label]] = field(default_factory=dict)
    """Of the "first" and the "second" response."""
    user: str | None = None
    created: float = field(default_factory=time.time)

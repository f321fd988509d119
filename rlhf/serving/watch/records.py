"""What the store knows of responses, scores and alarms, for those who watch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sqlalchemy import func, insert, select, update

from rlhf.config import PPOConfig
from rlhf.evaluation.refusals import BEGINNING, PATTERN, matches
from rlhf.serving.store import Store
from rlhf.serving.store.tables import alarms, exchanges, scores, votes

UNSAFE_BELOW: float = PPOConfig.model_fields["safety_threshold"].default
"""Of the probability that a response is safe, as PPO has it (`ppo.safety_threshold`)."""
SAFETY = "safety"
MOST = 20_000  # responses that are looked at, the newest


class Unscored(NamedTuple):
    id: str
    messages: Sequence[Mapping[str, str]]
    response: str


@dataclass
class Observed:
    """One response without its text."""

    id: str
    created: float
    cluster: str
    """The person where there is a name, else the conversation."""
    refused: bool
    length: int
    seconds: float
    first_token_s: float | None
    scores: dict[str, float] = field(default_factory=dict)
    unsafe: bool | None = None
    thumbs: list[bool] = field(default_factory=list)
    """Up or down, of everybody."""
    compared: int = 0
    """Votes on a pair in which this response was shown first."""


def unscored(
    store: Store, name: str, digest: str | None, limit: int, since: float = 0.0, without: Collection[str] = ()
) -> list[Unscored]:
    """Responses of chats that this reward model has not read, the newest first. `without`: ids that are left out."""
    known = select(scores.c.id).where(
        scores.c.exchange_id == exchanges.c.id, scores.c.name == name, scores.c.digest.is_not_distinct_from(digest)
    )
    query = (
        select(exchanges.c.id, exchanges.c.messages, exchanges.c.response)
        .where(exchanges.c.kind == "chat", exchanges.c.created >= since)
        .where(~known.exists(), exchanges.c.id.not_in(list(without)))
        .order_by(exchanges.c.created.desc())
        .limit(limit)
    )
    with store.engine.connect() as connection:
        return [Unscored(*row) for row in connection.execute(query)]


def observed(store: Store, since: float) -> list[Observed]:
    """The responses since then, the oldest first; of more than MOST the newest."""
    beginning = func.substr(exchanges.c.response, 1, BEGINNING).label("beginning")
    columns = exchanges.c.id, exchanges.c.user_id, exchanges.c.messages, exchanges.c.created, beginning
    numbers = exchanges.c.completion_tokens, exchanges.c.seconds, exchanges.c.first_token_s
    query = (
        select(*columns, *numbers).where(exchanges.c.created >= since).order_by(exchanges.c.created.desc()).limit(MOST)
    )
    with store.engine.connect() as connection:
        rows = connection.execute(query).all()[::-1]
    refused = matches(PATTERN, [row.beginning for row in rows])
    found = {row.id: _observed(row, refuses) for row, refuses in zip(rows, refused, strict=True)}
    if found:
        _add_scores(store, found, rows[0].created)
        _add_votes(store, found)
    return list(found.values())


def _observed(row: Any, refused: bool) -> Observed:
    return Observed(
        id=row.id,
        created=row.created,
        cluster=f"user {row.user_id}" if row.user_id is not None else conversation(row.messages),
        refused=refused,
        length=row.completion_tokens,
        seconds=row.seconds,
        first_token_s=row.first_token_s,
    )


def conversation(messages: Sequence[Mapping[str, str]]) -> str:
    """The same for all responses of a conversation: a digest of what it began with."""
    first = next((each["content"] for each in messages if each["role"] != "system"), "")
    return hashlib.blake2b(first.encode(), digest_size=8).hexdigest()


def _add_scores(store: Store, found: Mapping[str, Observed], since: float) -> None:
    """Of the newest reward model of each name: scores of different models are on different scales."""
    query = (
        select(scores.c.exchange_id, scores.c.name, scores.c.value, scores.c.raw, scores.c.digest)
        .join_from(scores, exchanges)
        .where(exchanges.c.created >= since)
        .order_by(scores.c.created, scores.c.id)
    )
    with store.engine.connect() as connection:
        rows = connection.execute(query).all()
    newest = {row.name: row.digest for row in rows}
    for row in rows:
        if row.exchange_id in found and row.value is not None and row.digest == newest[row.name]:
            one = found[row.exchange_id]
            one.scores[row.name] = row.value
            if row.name == SAFETY and row.raw is not None:
                one.unsafe = row.raw < math.log(UNSAFE_BELOW / (1 - UNSAFE_BELOW))


def _add_votes(store: Store, found: Mapping[str, Observed]) -> None:
    """The last thumb of a person on a response counts."""
    since = next(iter(found.values())).created
    query = select(votes).where(votes.c.created >= since).order_by(votes.c.id)
    with store.engine.connect() as connection:
        rows = connection.execute(query).all()
    thumbs: dict[tuple[str, Any], bool] = {}
    for row in rows:
        if row.first not in found:
            continue
        if row.thumb is not None:
            thumbs[row.first, ("vote", row.id) if row.user_id is None else row.user_id] = row.thumb == "up"
        elif row.second is not None:
            found[row.first].compared += 1
    for (name, _), up in thumbs.items():
        found[name].thumbs.append(up)


@dataclass(frozen=True)
class Alarm:
    rule: str
    value: float
    low: float | None
    high: float | None
    n: int
    began: float
    ended: float | None = None
    id: int | None = None


def begin_alarm(store: Store, alarm: Alarm) -> None:
    values = {key: value for key, value in vars(alarm).items() if key != "id"}
    with store.engine.begin() as connection:
        connection.execute(insert(alarms), values)


def end_alarm(store: Store, rule: str, now: float) -> None:
    with store.engine.begin() as connection:
        connection.execute(update(alarms).where(alarms.c.rule == rule, alarms.c.ended.is_(None)).values(ended=now))


def on(store: Store) -> dict[str, Alarm]:
    """By rule, the alarms that have not ended."""
    return {each.rule: each for each in _alarms(store, select(alarms).where(alarms.c.ended.is_(None)))}


def newest_alarms(store: Store, count: int) -> list[Alarm]:
    return list(_alarms(store, select(alarms).order_by(alarms.c.began.desc(), alarms.c.id.desc()).limit(count)))


def _alarms(store: Store, query: Any) -> Iterable[Alarm]:
    with store.engine.connect() as connection:
        return [Alarm(**row._mapping) for row in connection.execute(query)]

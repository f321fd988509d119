"""One database of exchanges and votes. Every method is one transaction."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Row, create_engine, delete, event, func, insert, or_, select
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from rlhf.config import without_secrets
from rlhf.errors import UserError
from rlhf.serving.store.redact import redacted
from rlhf.serving.store.tables import Exchange, Score, Vote, exchanges, scores, users, votes

DAY_S = 86_400
BUSY_S = 30  # how long SQLite waits for another process
SQLITE = "sqlite:///"


class Deleted(NamedTuple):
    exchanges: int
    votes: int


class Store:
    """UserError (2, 8) for an address that is none, or where no database answers."""

    def __init__(self, url: str, redact: bool = False) -> None:
        """`redact`: see redact.py. The tables are made, or brought to the present form."""
        self.shown = without_secrets(url)
        self._clean: Callable[[str], str] = redacted if redact else str
        try:
            address = make_url(url.replace("postgresql://", "postgresql+psycopg://", 1))
            if address.get_backend_name() == "sqlite" and address.database:
                _private(Path(address.database))
            self.engine = create_engine(address, pool_pre_ping=True, pool_size=4)
        except (ArgumentError, ModuleNotFoundError) as error:
            hint = "; postgresql needs the extra postgresql" if isinstance(error, ModuleNotFoundError) else ""
            raise UserError(f"--store {self.shown}: not an address of a database{hint}") from error
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
        try:
            self._migrate()
        except (DBAPIError, OSError) as error:
            reason = without_secrets(str(getattr(error, "orig", error)).strip().partition("\n")[0])
            raise UserError(f"--store {self.shown}: the database does not answer: {reason}", 8) from error

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(resources.files("rlhf.serving.store") / "migrations"))
        with self.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def add(self, rows: Sequence[Exchange | Vote]) -> None:
        with self.engine.begin() as connection:
            for row in rows:
                self._add(connection, row)

    def _add(self, connection: Connection, row: Exchange | Vote) -> None:
        values = asdict(row)
        values["user_id"] = _user_id(connection, values.pop("user"))
        if isinstance(row, Exchange):
            values["messages"] = [{**message, "content": self._clean(message["content"])} for message in row.messages]
            values["response"] = self._clean(row.response)
            connection.execute(insert(exchanges), values)
        else:
            values["edit"] = None if row.edit is None else self._clean(row.edit)
            connection.execute(insert(votes), values)

    def add_scores(self, rows: Sequence[Score]) -> None:
        """IntegrityError where a response is kept no longer."""
        with self.engine.begin() as connection:
            connection.execute(insert(scores), [asdict(row) for row in rows])

    def knows(self, ids: Sequence[str]) -> bool:
        """Whether all these exchanges are kept."""
        wanted = set(ids)
        with self.engine.connect() as connection:
            found = connection.scalar(select(func.count()).where(exchanges.c.id.in_(wanted)))
        return found == len(wanted)

    def delete_user(self, name: str) -> Deleted:
        """Everything that this person said or voted, what was answered, and votes and scores about it."""
        with self._deleting() as connection:
            user_id = connection.scalar(select(users.c.id).where(users.c.name == name))
            if user_id is None:  # compared with NULL, everybody without a name would be meant
                return Deleted(0, 0)
            own = select(exchanges.c.id).where(exchanges.c.user_id == user_id)
            theirs = or_(votes.c.user_id == user_id, votes.c.first.in_(own), votes.c.second.in_(own))
            deleted_votes = connection.execute(delete(votes).where(theirs)).rowcount
            connection.execute(delete(scores).where(scores.c.exchange_id.in_(own)))
            deleted = connection.execute(delete(exchanges).where(exchanges.c.user_id == user_id)).rowcount
            connection.execute(delete(users).where(users.c.id == user_id))
        return Deleted(deleted, deleted_votes)

    def delete_older(self, days: float) -> Deleted:
        """Exchanges that are older, and what is about them; users of whom nothing is left."""
        before = time.time() - days * DAY_S
        with self._deleting() as connection:
            old = select(exchanges.c.id).where(exchanges.c.created < before)
            about = or_(votes.c.first.in_(old), votes.c.second.in_(old))
            deleted_votes = connection.execute(delete(votes).where(about)).rowcount
            connection.execute(delete(scores).where(scores.c.exchange_id.in_(old)))
            deleted = connection.execute(delete(exchanges).where(exchanges.c.created < before)).rowcount
            kept = [select(table.c.user_id).where(table.c.user_id.is_not(None)) for table in (exchanges, votes)]
            connection.execute(delete(users).where(users.c.id.not_in(kept[0]), users.c.id.not_in(kept[1])))
        return Deleted(deleted, deleted_votes)

    @contextmanager
    def _deleting(self) -> Iterator[Connection]:
        """SQLite overwrites what is deleted, and its log of recent writes is emptied, so that no file holds the text."""
        with self.engine.begin() as connection:
            yield connection
        if self.engine.dialect.name == "sqlite":
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def votes(self) -> list[Row[Any]]:
        """All votes with the name of their user, the oldest first."""
        query = select(votes, users.c.name.label("user")).join_from(votes, users, isouter=True).order_by(votes.c.id)
        with self.engine.connect() as connection:
            return list(connection.execute(query))

    def exchanges(self) -> dict[str, Row[Any]]:
        with self.engine.connect() as connection:
            return {row.id: row for row in connection.execute(select(exchanges).order_by(exchanges.c.created))}

    def scores(self) -> list[Row[Any]]:
        """Of the responses that a reward model could read, the oldest first."""
        with self.engine.connect() as connection:
            return list(connection.execute(select(scores).where(scores.c.value.is_not(None)).order_by(scores.c.id)))

    def close(self) -> None:
        self.engine.dispose()


def _user_id(connection: Connection, name: str | None) -> int | None:
    if name is None:
        return None
    found = connection.scalar(select(users.c.id).where(users.c.name == name))
    if found is None:
        made = connection.execute(insert(users).values(name=name, created=time.time()))
        found = made.inserted_primary_key[0]  # type: ignore[index]
    return found


def _private(file: Path) -> None:
    """The file before SQLite makes it: others of this machine must not read what people said."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)


def _prepare_sqlite(connection: Any, _: Any) -> None:
    for pragma in ("foreign_keys=ON", "journal_mode=WAL", f"busy_timeout={BUSY_S * 1000}", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")

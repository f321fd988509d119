"""What the store keeps, forgets and survives, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from rlhf.errors import UserError
from rlhf.serving.store import Exchange, Score, Store, Vote, Writer, redacted
from rlhf.serving.store import writer as writer_module
from rlhf.serving.store.tables import metadata
from tests.rlhf.tracking.stores import postgresql, postgresql_programs

needs_postgresql = pytest.mark.skipif(postgresql_programs() is None, reason="PostgreSQL is not installed")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with postgresql() as uri:
        yield uri


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[needs_postgresql, pytest.mark.integration])])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "sqlite":
        found = Store(f"sqlite:///{tmp_path}/feedback.db")
    else:
        found = Store(request.getfixturevalue("cluster"))
    yield found
    if request.param == "postgresql":
        with found.engine.begin() as connection:
            metadata.drop_all(connection)
            connection.execute(text("drop table alembic_version"))
    found.close()


def exchange(number: int, user: str | None = None, **more: Any) -> Exchange:
    return Exchange(
        id=f"chatcmpl-{number}:0",
        kind="chat",
        model="tiny",
        digest="d" * 64,
        messages=[{"role": "user", "content": f"question {number}"}],
        response=f"answer {number}",
        finish="stop",
        prompt_tokens=3,
        completion_tokens=2,
        seconds=0.5,
        sampling={"temperature": 0.7},
        user=user,
        **more,
    )


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_put_in_comes_out(store: Store) -> None:
    labels: Any = {"first": ["helpful", "safe"], "second": ["unsafe"]}
    pair = Vote("chatcmpl-1:0", "chatcmpl-2:0", "second", "slightly", labels=labels, user="ann")
    store.add([exchange(1, "ann"), exchange(2, "ann"), pair, Vote("chatcmpl-1:0", thumb="up", edit="中文 🙂")])
    store.add_scores([Score("chatcmpl-1:0", "helpful", 0.25)])
    found = store.exchanges()["chatcmpl-1:0"]
    assert found.messages == [{"role": "user", "content": "question 1"}]
    assert (found.response, found.sampling, found.digest) == ("answer 1", {"temperature": 0.7}, "d" * 64)
    voted, thumbed = store.votes()
    assert (voted.user, voted.first, voted.second) == ("ann", "chatcmpl-1:0", "chatcmpl-2:0")
    assert (voted.chosen, voted.rating, voted.labels) == ("second", "slightly", labels)
    assert (thumbed.user, thumbed.thumb, thumbed.edit, thumbed.second) == (None, "up", "中文 🙂", None)
    assert [(row.exchange_id, row.name, row.value) for row in store.scores()] == [("chatcmpl-1:0", "helpful", 0.25)]
    assert store.knows(["chatcmpl-1:0", "chatcmpl-2:0"])
    assert not store.knows(["chatcmpl-1:0", "chatcmpl-3:0"])


def test_migrations_make_the_tables_that_the_code_names(store: Store) -> None:
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    shown = store.engine.url.render_as_string(hide_password=False)
    Store(shown.replace("+psycopg", "")).close()  # a second time there is nothing to do


def test_a_response_that_no_model_can_read_has_no_score(store: Store) -> None:
    store.add([exchange(1, first_token_s=0.25)])
    store.add_scores(
        [Score("chatcmpl-1:0", "safety", 1.5, raw=5.0, digest="e" * 64), Score("chatcmpl-1:0", "other", None)]
    )
    (row,) = store.scores()
    assert (row.name, row.value, row.raw, row.digest) == ("safety", 1.5, 5.0, "e" * 64)
    assert store.exchanges()["chatcmpl-1:0"].first_token_s == 0.25


def test_a_store_of_the_first_form_keeps_what_it_has(store: Store) -> None:
    with store.engine.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(resources.files("rlhf.serving.store") / "migrations"))
        config.attributes["connection"] = connection
        metadata.drop_all(connection)
        connection.execute(text("delete from alembic_version"))
        command.upgrade(config, "0001")
        connection.execute(
            text(
                "insert into exchanges (id, kind, model, messages, response, finish, prompt_tokens, completion_tokens, "
                "seconds, sampling, created) values ('a', 'chat', 'm', '[]', 'old', 'stop', 1, 2, 0.5, '{}', 7)"
            )
        )
        connection.execute(
            text("insert into scores (exchange_id, name, value, created) values ('a', 'helpful', 0.5, 8)")
        )
    shown = store.engine.url.render_as_string(hide_password=False)
    later = Store(shown.replace("+psycopg", ""))
    assert [(row.id, row.response, row.first_token_s) for row in later.exchanges().values()] == [("a", "old", None)]
    assert [(row.exchange_id, row.value, row.digest) for row in later.scores()] == [("a", 0.5, None)]
    later.close()


def test_a_person_is_forgotten_and_others_are_not(store: Store) -> None:
    store.add([exchange(1, "ann"), exchange(2, "bob"), exchange(3)])
    store.add([Vote("chatcmpl-1:0", thumb="up", user="bob"), Vote("chatcmpl-2:0", thumb="up", user="ann")])
    store.add([Vote("chatcmpl-3:0", thumb="down", user="bob"), Vote("chatcmpl-3:0", "chatcmpl-1:0", "first")])
    store.add_scores([Score("chatcmpl-1:0", "helpful", 1.0)])
    store.add_scores([Score("chatcmpl-2:0", "helpful", 2.0)])
    assert store.delete_user("ann") == (1, 3)
    assert set(store.exchanges()) == {"chatcmpl-2:0", "chatcmpl-3:0"}
    assert [(row.first, row.user) for row in store.votes()] == [("chatcmpl-3:0", "bob")]
    assert [row.value for row in store.scores()] == [2.0]
    assert store.delete_user("ann") == store.delete_user("nobody") == (0, 0)
    with store.engine.connect() as connection:
        assert connection.scalars(text("select name from users")).all() == ["bob"]


def test_what_is_old_is_forgotten(store: Store) -> None:
    now = time.time()
    store.add([exchange(1, "ann", created=now - 3 * 86_400), exchange(2, "bob", created=now - 86_400)])
    store.add([Vote("chatcmpl-1:0", thumb="up", user="cid"), Vote("chatcmpl-2:0", thumb="up", user="bob")])
    store.add_scores([Score("chatcmpl-1:0", "helpful", 1.0)])
    assert store.delete_older(2) == (1, 1)
    assert set(store.exchanges()) == {"chatcmpl-2:0"}
    assert store.scores() == []
    with store.engine.connect() as connection:
        assert connection.scalars(text("select name from users")).all() == ["bob"]


def test_no_file_holds_what_was_deleted(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/deep/feedback.db")
    store.add([exchange(n, "ann") for n in range(200)])
    held = lambda: [file.name for file in (tmp_path / "deep").iterdir() if b"question 1" in file.read_bytes()]
    assert held()
    store.delete_user("ann")
    assert held() == []
    assert (tmp_path / "deep/feedback.db").stat().st_mode & 0o077 == 0
    store.close()


# --- writing beside the server


def test_a_vote_on_what_is_gone_stops_no_other(tmp_path: Path) -> None:
    writer = Writer(Store(f"sqlite:///{tmp_path}/feedback.db"))
    rows = [exchange(1), Vote("chatcmpl-9:0", thumb="up"), Vote("chatcmpl-1:0", thumb="up")]
    for row in rows:
        assert writer.add(row)
    until(lambda: writer.written + writer.dropped == 3)
    assert (writer.written, writer.dropped) == (2, 1)
    writer.close()


def test_a_full_queue_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FIRST_PAUSE_S", 0.01)

    def away(*_: Any) -> None:
        raise DBAPIError("insert", {}, Exception("gone"))

    writer = Writer(Store(f"sqlite:///{tmp_path}/feedback.db"), most_queued=5)
    with monkeypatch.context() as broken:
        broken.setattr(Store, "add", away)
        writer.add(exchange(0))
        until(lambda: writer.away)
        assert [writer.add(exchange(n)) for n in range(1, 8)] == [True] * 5 + [False] * 2
    until(lambda: writer.written == 6)
    assert (writer.dropped, writer.away, len(writer.store.exchanges())) == (2, False, 6)
    writer.close()


def test_retention_is_kept_while_serving(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/feedback.db"
    Store(url).add([exchange(1, created=time.time() - 9 * 86_400), exchange(2)])
    writer = Writer(Store(url), keep_days=7)
    until(lambda: len(writer.store.exchanges()) == 1)
    assert set(writer.store.exchanges()) == {"chatcmpl-2:0"}
    writer.close()


@needs_postgresql
@pytest.mark.integration
def test_a_database_that_goes_and_comes_back_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FIRST_PAUSE_S", 0.1)
    with postgresql() as uri:
        folder = Path(uri.partition("host=")[2])
        writer = Writer(Store(uri))
        writer.add(exchange(1))
        until(lambda: writer.written == 1)
        pg_ctl(folder, "-m", "immediate", "stop")
        for n in (2, 3):
            assert writer.add(exchange(n))
        until(lambda: writer.away)
        with pytest.raises(UserError, match="does not answer"):
            Store(uri)
        start_postgresql(folder)
        until(lambda: writer.written == 3)
        assert set(writer.store.exchanges()) == {f"chatcmpl-{n}:0" for n in (1, 2, 3)}
        assert (writer.dropped, writer.away) == (0, False)
        writer.close()


def start_postgresql(folder: Path) -> None:
    pg_ctl(folder, "-o", f"-c listen_addresses= -k {folder} -F", "-l", str(folder / "log"), "start")


def pg_ctl(folder: Path, *arguments: str) -> None:
    program = str(postgresql_programs() / "pg_ctl")  # type: ignore[operator]
    owner = "postgres" if os.geteuid() == 0 else None
    command = [program, "-D", str(folder / "data"), "-w", *arguments]
    subprocess.run(command, user=owner, cwd=folder, check=True, stdout=subprocess.DEVNULL)


# --- redaction


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("write to ann.b+c@mail.example.org now", "write to [email] now"),
        ("call +49 30 1234567 or (555) 123-4567", "call [phone] or [phone]"),
        ("手机 13812345678。", "手机 [phone]。"),
        ("card 4111 1111 1111 1111, not 4111 1111 1111 1112", "card [card], not 4111 1111 1111 1112"),
        ("from 192.168.0.1, version 1.2.3", "from [ip], version 1.2.3"),
        ("DE89 3704 0044 0532 0130 00", "[iban]"),
        ("what is 12 + 345, in 2026?", "what is 12 + 345, in 2026?"),
        ("pi is 3.14159265358979", "pi is 3.14159265358979"),
        ("my key is sk-abcdefghijklmnopqrstuvwx", "my key is ***"),
    ],
)
def test_personal_data_of_known_forms_is_left_out(said: str, kept: str) -> None:
    assert redacted(said) == kept


def test_a_store_that_redacts_keeps_none_of_it(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/feedback.db", redact=True)
    mail = "ann@example.org"
    store.add([Exchange(**{**vars(exchange(1)), "messages": [{"role": "user", "content": mail}], "response": mail})])
    store.add([Vote("chatcmpl-1:0", edit=mail)])
    assert store.exchanges()["chatcmpl-1:0"].messages == [{"role": "user", "content": "[email]"}]
    assert store.votes()[0].edit == "[email]"
    store.close()
    assert all(mail.encode() not in file.read_bytes() for file in tmp_path.iterdir())


def test_an_address_that_is_none() -> None:
    with pytest.raises(UserError, match="not an address"):
        Store("no address")

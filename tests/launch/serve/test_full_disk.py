"""A disk that is full under the store of `rlhf serve`, as SQLite meets it: no page can be added to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from rlhf.serving.store import Store, Writer
from rlhf.serving.store import writer as writer_module
from tests.launch.serve.servers import running, until

PAGES_LEFT, LONG = 4, 3000  # a page holds 4096 bytes


def test_serving_goes_on_while_the_disk_is_full_and_nothing_is_lost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer_module, "FIRST_PAUSE_S", 0.01)
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    disk = _Disk(store)
    with running(folder, writer=Writer(store)) as server, server.http() as http:
        writer = server.service.writer
        assert writer
        disk.hold(PAGES_LEFT)
        ids = [http.post("/predict", json={"text": f"{n} " * LONG, "max_tokens": 1}).json()["id"] for n in range(8)]
        until(lambda: writer.away)
        assert "rlhf_serve_store_up 0.0" in http.get("/metrics").text
        assert http.post("/v1/votes", json={"first": ids[-1], "thumb": "up"}).status_code == 200
        disk.hold(None)
        until(lambda: writer.written == 9)
        assert "rlhf_serve_store_up 1.0" in http.get("/metrics").text
    assert list(store.exchanges()) == ids and [vote.first for vote in store.votes()] == ids[-1:]
    assert writer.dropped == 0
    (said,) = [each.getMessage() for each in caplog.records if each.name == writer_module.__name__]
    assert "the store does not answer (OperationalError" in said and "0 0 0" not in said


class _Disk:
    """How many pages the file may have, in all connections that are made from now on."""

    def __init__(self, store: Store) -> None:
        self._store, self._most = store, 1 << 30
        event.listen(store.engine, "connect", lambda connection, _: self._limit(connection))

    def hold(self, pages: int | None) -> None:
        """`pages` more than now; None: as many as there are."""
        with self._store.engine.connect() as connection:
            used = int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())
        self._most = 1 << 30 if pages is None else used + pages
        self._store.engine.dispose()

    def _limit(self, connection: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={self._most}")

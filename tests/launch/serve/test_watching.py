"""The dashboard's route and pages, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from launch.serve import watching
from launch.serve.pages import FILES
from launch.watch.look import look
from rlhf.serving.store import Exchange, Score, Store, Writer
from rlhf.serving.watch.baseline import Baseline
from rlhf.serving.watch.records import Alarm, begin_alarm
from tests.launch.serve.servers import TOKEN, Running, running


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Running]:
    writer = Writer(Store(f"sqlite:///{tmp_path}/feedback.db"))
    baseline = Baseline(tmp_path, {"length": [10.0] * 50 + [20.0] * 50})
    with running(folder, writer=writer, baseline=baseline) as found:
        yield found


def fill(store: Store, count: int = 10, ago_s: float = 60.0) -> None:
    messages = [{"role": "user", "content": "a secret question"}]
    for number in range(count):
        row = Exchange(
            f"r{number}", "chat", "m", None, messages, "a secret answer", "stop", 3, 20, 2.0, {}, first_token_s=0.5
        )
        store.add([Exchange(**vars(row) | {"created": time.time() - ago_s, "user": f"user {number}"})])
        store.add_scores([Score(row.id, "safety", 1.0, 2.0 if number else -2.0, "d")])
    begin_alarm(store, Alarm("unsafe > 0.05 in 1h", 0.1, 0.06, 0.3, 10, time.time()))


def test_the_look_is_that_of_the_store(server: Running) -> None:
    assert server.service.writer
    fill(server.service.writer.store)
    with server.http() as http:
        answer = http.get("/v1/watch", params={"span": "1h"})
        assert answer.status_code == 200
        found = answer.json()
        assert http.get("/v1/watch", params={"span": "2h"}).status_code == 422
    assert len(found["buckets"]) == 12
    assert found["whole"]["unsafe"]["value"] == 0.1
    assert found["buckets"][-1]["metrics"]["length"] == {"value": 20, "low": 20, "high": 20, "n": 10}
    assert set(found["drift"]) == {"length"}
    assert [alarm["rule"] for alarm in found["alarms"]] == ["unsafe > 0.05 in 1h"]
    assert "secret" not in answer.text


def test_many_looks_cost_one(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    assert server.service.writer
    found = look(server.service.writer.store, time.time(), 3600, 2)
    monkeypatch.setattr(watching, "look", lambda *args: calls.append(args) or found)
    with server.http() as http:
        assert [http.get("/v1/watch").status_code for _ in range(5)] == [200] * 5
        assert len(calls) == 1


def test_a_store_that_is_away_is_503_and_none_is_404(
    server: Running, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise DBAPIError("select", {}, Exception("gone"))

    monkeypatch.setattr(watching, "look", away)
    with server.http() as http:
        assert http.get("/v1/watch").status_code == 503
    with running(folder) as without, without.http() as http:
        assert http.get("/v1/watch").status_code == 404


def test_pages_need_the_token_which_goes_into_a_cookie(server: Running) -> None:
    with server.http(token="") as http:
        assert [http.get(path).status_code for path in [*FILES, "/v1/watch"]] == [401] * (len(FILES) + 1)
        for page in ("/", "/dashboard"):
            answer = http.get(page, params={"token": TOKEN})
            assert (answer.status_code, answer.headers["location"]) == (303, page)
        assert all(http.get(path).status_code == 200 for path in FILES)  # with the cookie
        assert "text/javascript" in http.get("/page/dashboard.js").headers["content-type"]

"""What people say and vote is kept, and forgotten when they want it, through the HTTP interface and the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from launch import cli
from launch.serve.feedback import default_store
from rlhf.serving.store import Store, Writer
from rlhf.serving.store import writer as writer_module
from tests.launch.serve.servers import Running, running, until

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "feedback"


@pytest.fixture
def server(folder: Path, store: Path) -> Iterator[Running]:
    with running(folder, writer=Writer(Store(f"sqlite:///{store}/feedback.db"))) as found:
        yield found


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """For tests that do not count what is kept."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('shared')}/feedback.db")
    with running(folder, writer=Writer(store)) as found:
        yield found


def kept(server: Running) -> Store:
    writer = server.service.writer
    assert writer
    until(lambda: not writer.queued and writer.written)
    return writer.store


def test_a_pair_of_responses_and_the_vote_on_it_are_kept(server: Running) -> None:
    with server.http() as http:
        asked = {"messages": MESSAGES, "n": 2, "max_tokens": 5, "seed": 4, "user": "ann", "temperature": 0.5}
        found = http.post("/v1/chat/completions", json=asked).json()
        first, second = (f"{found['id']}:{n}" for n in (0, 1))
        labels = {"first": ["unsafe"], "second": ["helpful", "safe"]}
        vote = {
            "first": first,
            "second": second,
            "chosen": "second",
            "rating": "better",
            "labels": labels,
            "user": "ann",
        }
        answer = http.post("/v1/votes", json=vote)
        assert (answer.status_code, answer.json()) == (200, {"kept": True})
        until(lambda: server.service.writer and server.service.writer.written == 3)
    store = kept(server)
    exchange = store.exchanges()[second]
    assert exchange.response == found["choices"][1]["message"]["content"]
    assert (exchange.messages, exchange.model, exchange.completion_tokens) == (MESSAGES, "tiny", 5)
    assert exchange.sampling == {"temperature": 0.5, "top_p": 1.0, "max_tokens": 5, "seed": 4}
    (row,) = store.votes()
    assert (row.first, row.second, row.chosen, row.rating, row.labels, row.user) == (
        first,
        second,
        "second",
        "better",
        labels,
        "ann",
    )


def test_a_stream_and_a_prediction_are_kept_too(server: Running) -> None:
    with server.http() as http:
        predicted = http.post("/predict", json={"text": "hello", "max_tokens": 2}).json()
        client = server.openai()
        ids = {chunk.id for chunk in client.completions.create(model="tiny", prompt="a", max_tokens=3, stream=True)}
        until(lambda: server.service.writer and server.service.writer.written == 2)
        assert set(kept(server).exchanges()) == {predicted["id"], f"{ids.pop()}:0"}
        assert http.post("/v1/votes", json={"first": predicted["id"], "thumb": "up"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({}, 200),
        ({"rating": None}, 422),
        ({"chosen": "third"}, 422),
        ({"rating": "much"}, 422),
        ({"second": None}, 422),
        ({"thumb": "up"}, 422),
        ({"labels": {"first": ["nice"]}}, 422),
        ({"first": "chatcmpl-none:0"}, 404),
        ({"second": "same"}, 422),
        ({"user": ""}, 422),
        ({"user": "a" * 201}, 422),
    ],
)
def test_votes_that_say_nothing_are_refused(shared: Running, change: dict[str, Any], status: int) -> None:
    with shared.http() as http:
        found = http.post("/v1/chat/completions", json={"messages": MESSAGES, "n": 2, "max_tokens": 1}).json()
        first, second = (f"{found['id']}:{n}" for n in (0, 1))
        vote = {"first": first, "second": second, "chosen": "first", "rating": "slightly", **change}
        vote["second"] = first if vote["second"] == "same" else vote["second"]
        assert http.post("/v1/votes", json=vote).status_code == status


def test_serving_goes_on_without_its_database(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FIRST_PAUSE_S", 0.01)
    writer = server.service.writer
    assert writer

    def away(*_: Any) -> None:
        raise DBAPIError("insert", {}, Exception("gone"))

    with server.http() as http:
        with monkeypatch.context() as broken:
            broken.setattr(Store, "add", away)
            broken.setattr(Store, "knows", away)
            found = [http.post("/predict", json={"text": "hello", "max_tokens": 1}) for _ in range(3)]
            assert [each.status_code for each in found] == [200] * 3
            until(lambda: writer.away)
            vote = http.post("/v1/votes", json={"first": found[0].json()["id"], "thumb": "up"})
            assert vote.status_code == 200  # the response is known without the database
            assert http.post("/v1/votes", json={"first": "other:0", "thumb": "up"}).status_code == 503
            assert "rlhf_serve_store_up 0.0" in http.get("/metrics").text
        until(lambda: writer.written == 4)
        assert "rlhf_serve_store_up 1.0" in http.get("/metrics").text
    assert len(writer.store.exchanges()) == 3


def test_a_person_is_forgotten_by_one_command(
    server: Running, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server.http() as http:
        for user in ("ann", "ann", "bob"):
            http.post("/predict", json={"text": "hello", "max_tokens": 1, "user": user})
        until(lambda: server.service.writer and server.service.writer.written == 3)
    assert cli.main(["feedback", "delete", "--user", "ann", "--store", str(store)]) == 0
    assert capsys.readouterr().out == "deleted: 2 exchanges, 0 votes\n"
    assert len(kept(server).exchanges()) == 1
    assert cli.main(["feedback", "delete", "--user", "ann", "--store", str(tmp_path / "other")]) == 4


def test_the_store_of_a_run_is_in_its_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert default_store(tmp_path / "ppo/artifact") == tmp_path / "feedback"
    assert default_store(tmp_path / "other") == Path("feedback")

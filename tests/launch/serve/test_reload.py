"""A model takes the place of another one while requests run, and an alias of a real registry that moves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx2
import pytest

from launch.serve.command import TOKEN as TOKEN_VARIABLE
from launch.serve.reload import RETRY_S, Reloader
from launch.serve.source import Source
from rlhf.serving.batch import Batch
from rlhf.serving.engine import EngineDown
from rlhf.serving.model import ServedModel
from rlhf.serving.store import Store
from tests.launch.serve.servers import TOKEN, Running, free_port, running, until
from tests.rlhf.serving.models import make_folder

ROOT = Path(__file__).parents[3]
ALIAS = "models:/contest@champion"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("other") / "model", seed=1)


def load(name: str, source: Source) -> ServedModel:
    model = ServedModel(name, source.folder, 100, version=source.version)
    model.stop_ids = frozenset()  # random weights end a response anywhere
    return model


def greedy(http: httpx2.Client, tokens: int) -> str:
    asked = {"prompt": "hello", "max_tokens": tokens, "temperature": 0}
    return http.post("/v1/completions", json=asked).raise_for_status().json()["choices"][0]["text"]


def streamed(http: httpx2.Client, tokens: int, on_first: Callable[[], Any] = lambda: None) -> str:
    """The text of a response that is complete."""
    asked = {"prompt": "hello", "max_tokens": tokens, "temperature": 0, "stream": True}
    text, finish = "", None
    with http.stream("POST", "/v1/completions", json=asked) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                on_first()
                text, finish = text + choice["text"], choice["finish_reason"] or finish
    assert finish == "length"
    return text


# --- in this process


def test_a_response_ends_on_the_model_that_began_it_and_the_next_has_the_new_one(folder: Path, other: Path) -> None:
    with running(other) as server, server.http() as http:
        of_new = greedy(http, 20)
    with running(folder) as server, server.http() as http:
        of_old = greedy(http, 600)
        old = weakref.ref(server.model)
        thread = server.model.engine._thread
        begun, told = threading.Event(), []
        reading = threading.Thread(target=lambda: told.append(streamed(http, 600, begun.set)))
        reading.start()
        assert begun.wait(60)
        server.service.replace(load("tiny", Source(other, "models:/contest/2")))
        assert not told and thread.is_alive()
        assert greedy(http, 20) == of_new != of_old[: len(of_new)]
        reading.join(60)
        assert told == [of_old]
        until(lambda: old() is None and not thread.is_alive())  # its memory is free
        assert http.get("/v1/models").json()["data"][0]["version"] == "models:/contest/2"
        assert http.get("/ready").json()["models"] == {"tiny": {"version": "models:/contest/2", "digest": None}}


def test_a_model_that_samples_nothing_does_not_take_the_place(
    folder: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(folder) as server, server.http() as http:
        before = greedy(http, 5)
        broken = load("tiny", Source(other))
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "admit", lambda *_: 1 / 0)
            with pytest.raises(EngineDown):
                server.service.replace(broken)
        assert not broken.engine.up and not broken.engine._thread.is_alive()
        assert greedy(http, 5) == before


# --- an alias


class Contest:
    """A registry in SQLite with versions of these folders."""

    def __init__(self, place: Path, *folders: Path) -> None:
        from mlflow import MlflowClient

        self.uri = f"sqlite:///{place}/mlflow.db"
        self._client = MlflowClient(self.uri)
        self._client.create_registered_model("contest")
        for folder in folders:
            tags = {"artifact.path": str(folder), "artifact.digest": folder.parent.name}
            self._client.create_model_version("contest", str(folder), tags=tags)
        self.move(1)

    def move(self, number: int) -> None:
        self._client.set_registered_model_alias("contest", "champion", str(number))

    def forget(self) -> None:
        self._client.delete_registered_model_alias("contest", "champion")


def reloader(server: Running, uri: str) -> Reloader:
    server.model.version = "models:/contest/1"
    return Reloader(server.service, {"tiny": ALIAS}, uri, load)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "launch.serve.reload"]


def test_the_model_follows_its_alias_and_stays_where_there_is_nothing_to_load(
    folder: Path, other: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    contest = Contest(tmp_path, folder, other, tmp_path / "none")
    with running(folder) as server:
        found = reloader(server, contest.uri)
        first = server.model
        found.look()
        assert server.model is first
        contest.move(3)
        for _ in range(2):
            found.look()
        assert server.model is first
        (failure,) = said(caplog)  # once, and tried again later
        assert "models:/contest/3 cannot be loaded, models:/contest/1 goes on" in failure and "none" in failure
        monkeypatch.setattr("launch.serve.reload.RETRY_S", -1.0)
        found.look()
        assert len(said(caplog)) == 2 and RETRY_S > 0
        contest.forget()
        for _ in range(2):
            found.look()
        assert len(said(caplog)) == 3 and server.model is first
        contest.move(2)
        found.look()
        assert server.model is not first and server.model.version == "models:/contest/2"
        contest.move(1)
        found.look()
        assert server.model.version == "models:/contest/1"


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_served_champion_gives_way_while_it_streams(folder: Path, other: Path, tmp_path: Path) -> None:
    contest, port = Contest(tmp_path, folder, other), free_port()
    command = [sys.executable, "-m", "launch.cli", "serve", "contest@champion", "--tracking-uri", contest.uri]
    environment = os.environ | {"PYTHONPATH": str(ROOT), TOKEN_VARIABLE: TOKEN}
    options = ["--port", str(port), "--max-tokens", "6000", "--rate", "0"]
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen([*command, *options], env=environment, cwd=tmp_path, stdout=out, stderr=out)
    client = httpx2.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=200
    )
    with closing(client) as http:
        try:
            until(lambda: process.poll() is not None or _ready(http), 200)
            assert http.get("/v1/models").json()["data"][0]["version"] == "models:/contest/1"
            begun, told = threading.Event(), []
            reading = threading.Thread(target=lambda: told.append(_whole(http, 6000, begun.set)))
            reading.start()
            assert begun.wait(60)
            contest.move(2)
            served = set()
            while "models:/contest/2" not in served:  # each of these must be answered
                assert not told, "the response ended before the alias was looked at"
                served.add(_whole(http, 3))
            reading.join(200)
            assert told == ["models:/contest/1"] and served <= {"models:/contest/1", "models:/contest/2"}
        finally:
            process.terminate()
            code = process.wait(60)
    assert code == 0, (tmp_path / "log").read_text()
    kept = Store(f"sqlite:///{tmp_path}/feedback/feedback.db").exchanges().values()
    assert {row.version for row in kept} == {"models:/contest/1", "models:/contest/2"}
    assert {row.completion_tokens for row in kept if row.version.endswith("1")} >= {6000}
    assert "models:/contest/2 in place of models:/contest/1" in (tmp_path / "log").read_text()


def _ready(http: httpx2.Client) -> bool:
    try:
        return http.get("/ready").status_code == 200
    except httpx2.HTTPError:
        return False


def _whole(http: httpx2.Client, tokens: int, on_first: Callable[[], Any] = lambda: None) -> str:
    """The version that streamed a response of this length or, where the model ends it, of another one."""
    asked = {"prompt": "hello", "max_tokens": tokens, "temperature": 0, "stream": True}
    version, finish = "", None
    with http.stream("POST", "/v1/completions", json=asked) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                on_first()
                version, finish = chunk["system_fingerprint"], chunk["choices"][0]["finish_reason"] or finish
    assert finish == "length"
    return version

"""`rlhf serve` as a process: what it says, how it stops, and what it refuses to do."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch import cli
from launch.serve.command import TOKEN
from rlhf.serving.store import Store
from tests.launch.serve.servers import free_port, until

ROOT = Path(__file__).parents[3]


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_command_serves_until_it_is_told_to_stop(folder: Path, tmp_path: Path, number: int) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "launch.cli", "serve", str(folder), "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if key != TOKEN} | {"PYTHONPATH": str(ROOT)}
    with (
        log.open("w") as out,
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=out, stderr=out) as process,
    ):
        try:
            until(lambda: process.poll() is not None or _ask(port, "/health", "") == 200)
            token = re.search(r"token .*: (\S+)", log.read_text())
            assert token, log.read_text()
            assert _ask(port, "/ready", token[1]) == 200
            assert _ask(port, "/v1/models", "") == 401
            assert (
                _ask(port, "/predict", token[1], {"text": "a secret of a person", "max_tokens": 3, "user": "ann"})
                == 200
            )
            process.send_signal(number)
            assert process.wait(60) == 0
            (kept,) = Store(f"sqlite:///{tmp_path}/feedback/feedback.db").exchanges().values()
            assert (kept.messages[-1]["content"], kept.user_id) == ("a secret of a person", 1)
        finally:
            process.kill()
    assert log.read_text().count("\n") == 4  # no line about a request, and nothing of its text


def _ask(port: int, path: str, token: str, body: dict | None = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:  # not there yet
        return 0


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_another_address_demands_a_token(
    folder: Path, host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN, raising=False)
    assert cli.main(["serve", str(folder), "--host", host]) == 2
    assert f"set {TOKEN}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_said_before_models_are_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["serve", "no/such/model", "--port", str(taken.getsockname()[1])]) == 5
    assert "choose another --port" in capsys.readouterr().err
    monkeypatch.setenv(TOKEN, "with a space")
    assert cli.main(["serve", "no/such/model"]) == 2


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(free_port())
    assert cli.main(["serve", str(tmp_path / "none"), "--port", port]) == 4
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert cli.main(["serve", "quickstart-ppo@champion", "--port", port, "--tracking-uri", uri]) == 4
    assert cli.main(["serve", "quickstart-ppo@champion", "--port", port, "--tracking-uri", "null"]) == 2

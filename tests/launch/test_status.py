"""The file that says what a run does, and when the terminal gets a line of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import status


class Terminal:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say_once(self, line: str) -> None:
        self.said.append(line)


def test_the_file_has_every_wait_at_once_and_the_terminal_those_that_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, terminal = [100.0], Terminal()
    monkeypatch.setattr(status.time, "monotonic", lambda: now[0])
    one = status.Status(tmp_path, terminal)  # type: ignore[arg-type]

    def waits_for(seconds: float, text: str) -> list[str]:
        now[0] = 100.0 + seconds
        one.set("sft", "running", text)
        assert json.loads((tmp_path / "status.json").read_text())["stages"]["sft"]["waits_for"] == text
        return terminal.said

    wait = "rank 1 on far to start, since 08:00:0{}, 600 s at most"
    assert waits_for(0, wait.format(0)) == waits_for(29, wait.format(1)) == []
    said = [f"sft: waits for {wait.format(0)}"]
    assert waits_for(31, wait.format(0)) == waits_for(90, wait.format(1)) == said
    assert waits_for(91, "") == waits_for(92, wait.format(0)) == waits_for(121, wait.format(0)) == said
    assert len(waits_for(123, wait.format(0))) == 2  # it is another wait


def test_the_end_is_in_the_file(tmp_path: Path) -> None:
    one = status.Status(tmp_path, Terminal())  # type: ignore[arg-type]
    one.set("sft", "running", "room in the cluster beside ppo", restarts=2)
    one.end("KILLED", "stopped by SIGTERM")
    content = json.loads((tmp_path / "status.json").read_text())
    assert content["ended"] == {"status": "KILLED", "reason": "stopped by SIGTERM"}
    assert content["stages"]["sft"] == {"state": "running", "waits_for": "", "restarts": 2}
    assert content["driver"]["pid"] > 0

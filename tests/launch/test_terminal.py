"""What a person sees while a stage runs, from its progress file to the screen."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from launch import terminal
from launch.terminal import StageBars
from rlhf.runs.context import Progress

WARNING = "iteration 3: KL to the SFT model is 61 nats per response, over 50 [ppo.alarms.kl_max]"


def shown(folder: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> str:
    """What stands on the screen after a stage that warned once, and was looked at twice."""
    screen = StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, force_terminal=is_terminal, width=120))
    progress = Progress(folder / "ppo", is_writer=True)
    with StageBars(folder) as bars:
        bars.add("ppo")
        progress.update(2, 10, kl=1.5)
        bars.refresh()
        progress.warn(WARNING)
        progress.update(3, 10, kl=61.0)
        bars.refresh()
        progress.update(10, 10, kl=2.0)
        bars.refresh()
        bars.finish("ppo", "done")
    return screen.getvalue()


def test_a_warning_stands_under_the_bars_when_they_have_stopped(tmp_path, monkeypatch):
    last_frame = shown(tmp_path, monkeypatch, is_terminal=True).rpartition("10/10")[2]
    assert last_frame.count(f"ppo: warning: {WARNING}") == 1


def test_without_a_terminal_a_warning_is_one_line(tmp_path, monkeypatch):
    lines = shown(tmp_path, monkeypatch, is_terminal=False).splitlines()
    assert [line.split(":")[0:2] for line in lines] == [
        ["ppo", " started"],
        ["ppo", " warning"],
        ["ppo", " done after 0 s, kl 2.000"],
    ]
    assert lines[1] == f"ppo: warning: {WARNING}"


def test_a_stage_without_warnings_has_bars_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "warn", lambda self, text: None)
    assert "warning" not in shown(tmp_path, monkeypatch, is_terminal=True)

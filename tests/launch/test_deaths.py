"""Workers that are killed in real runs: the first death is named as the cause, and the stage goes on or ends with it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rlhf.tracking import read_metrics
from tests.faults.runs import SMOKE, newest_checkpoint, pid_of, rlhf, steps, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

UNPACKED = ["--tracking.uri", "null", "--sft.packing", "false"]  # 32 steps an epoch
STAGE = ["stage", "sft", str(SMOKE), *UNPACKED]
HOST = os.uname().nodename


def test_two_deaths_with_a_checkpoint_between_are_survived_and_named(tmp_path: Path) -> None:
    """With one restart, which every checkpoint gives back."""
    process = rlhf(tmp_path, *STAGE, "--sft.epochs", "2", "--sft.checkpoints", "7")
    folder = tmp_path / "runs/smoke/sft"
    for rank in (1, 0):
        reached = newest_checkpoint(folder)
        wait_for(lambda: newest_checkpoint(folder) > reached and pid_of(folder, rank), process)  # noqa: B023
        victim = pid_of(folder, rank)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: pid_of(folder, rank) not in (0, victim), process)  # noqa: B023
    shown, _ = process.communicate(timeout=400)
    assert process.returncode == 0, shown
    said = [line for line in shown.splitlines() if "waits for" not in line]
    assert said[0] == "sft: started" and said[-1].startswith("sft: done after ") and len(said) == 4
    for rank, line in ((1, said[1]), (0, said[2])):
        assert line.startswith(f"sft: rank {rank} on {HOST} was killed (signal 9); goes on after step ")
    assert [step for step, _ in read_metrics(folder)["sft/loss"]] == list(range(1, 2 * 32 + 1))
    assert steps(folder).count(1) == 1  # it did not start over
    status = json.loads((tmp_path / "runs/smoke/status.json").read_text())
    assert status["stages"]["sft"]["restarts"] == 2 and status["ended"]["status"] == "FINISHED"
    assert "died or was killed" in (tmp_path / "runs/smoke/ray/messages.log").read_text()
    assert (folder / "artifact/manifest.json").is_file()


def test_a_stage_without_restarts_ends_with_the_first_death_as_its_cause(tmp_path: Path) -> None:
    process = rlhf(tmp_path, *STAGE, "--sft.epochs", "99", "--hardware.max_restarts", "0")
    folder = tmp_path / "runs/smoke/sft"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(steps(folder)) > 2, process)
    os.kill(pid_of(folder, 1), signal.SIGKILL)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 6, shown
    reason = f"rank 1 on {HOST} was killed (signal 9)"
    assert f"error: sft failed: {reason}" in shown and "gloo" not in shown
    ended = json.loads((tmp_path / "runs/smoke/status.json").read_text())["ended"]
    assert ended["status"] == "FAILED" and reason in ended["reason"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["status"] for event in events if event["event"] == "status"] == ["RUNNING", "FAILED"]

"""Two drivers on one run folder, as real processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.runs import SMOKE, checkpoints, claim_of_another_host, rlhf, steps, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LOCAL = ["stage", "sft", str(SMOKE), "--local", "--tracking.uri", "null"]
LONG = ["--sft.packing", "false", "--sft.epochs", "99", "--sft.checkpoints", "99"]


def test_the_second_is_refused_and_a_worker_of_a_folder_that_was_taken_over_writes_no_more(tmp_path: Path) -> None:
    first, run = rlhf(tmp_path, *LOCAL, *LONG), tmp_path / "runs/smoke"
    wait_for(lambda: checkpoints(run / "sft"), first)
    second = rlhf(tmp_path, *LOCAL, *LONG)
    said, _ = second.communicate(timeout=120)
    assert second.returncode == 2 and f"has a driver already: process {first.pid} on " in said
    claim_of_another_host(run)
    shown, _ = first.communicate(timeout=60)
    assert first.returncode == 6 and "was taken over by process 1 on far" in shown
    assert json.loads((run / "driver.json").read_text())["key"] == "theirs"
    events = [json.loads(line) for line in (run / "sft/events.jsonl").read_text().splitlines()]
    assert [event["status"] for event in events if event["event"] == "status"] == ["RUNNING"]
    assert not (run / "sft/failure.json").exists() and not (run / "sft/artifact").exists()
    assert len(steps(run / "sft")) < 99 * 32

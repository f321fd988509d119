"""SIGTERM and Ctrl-C, to real runs: they end after a step with a checkpoint, and go on from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.faults.runs import SMOKE, checkpoints, python, rlhf, steps, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

LONG = ["--sft.packing", "false", "--sft.epochs", "99", "--sft.checkpoints", "1"]
STAGE = ["stage", "sft", str(SMOKE), *LONG]
FILES = ["--tracking.uri", "null"]


def training(folder: Path, process: subprocess.Popen[str], beyond: int = 0) -> None:
    wait_for(lambda: (folder / "metrics.jsonl").exists() and len(steps(folder)) > beyond, process)


def statuses(folder: Path) -> list[str]:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["status"] for event in events if event["event"] == "status"]


def newest(folder: Path) -> int:
    return int(checkpoints(folder)[-1].name.rpartition("-")[2])


def test_sigterm_ends_the_workers_after_their_step_and_a_second_one_at_once(tmp_path: Path) -> None:
    process, folder = rlhf(tmp_path, *STAGE), tmp_path / "runs/smoke/sft"
    training(folder, process)
    process.send_signal(signal.SIGTERM)  # the driver alone
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 143, shown
    assert f"error: sft: stopped by SIGTERM after step {newest(folder)}, with a checkpoint" in shown
    assert newest(folder) == steps(folder)[-1]
    assert statuses(folder) == ["RUNNING", "KILLED"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments() if e.name == "rlhf"])
    assert run.info.status == "KILLED" and "stopped by SIGTERM" in run.data.tags["failure.reason"]

    before = newest(folder)
    process = rlhf(tmp_path, *STAGE)
    training(folder, process, beyond=before)
    assert steps(folder)[: before + 1] == list(range(1, before + 2))  # it went on, nothing was done twice
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)  # the whole process group, as Slurm and Kubernetes do
    time.sleep(1.2)
    os.killpg(process.pid, signal.SIGTERM)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == 143, shown
    assert "Traceback" not in shown and "SIGABRT" not in shown
    _, alive = psutil.wait_procs(children, timeout=30)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    assert statuses(folder)[-1] == "KILLED"


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGINT], 130), ([signal.SIGTERM, signal.SIGTERM], 143)])
def test_in_one_process(tmp_path: Path, signals: list[int], code: int) -> None:
    process, folder = rlhf(tmp_path, *STAGE, *FILES, "--local"), tmp_path / "runs/smoke/sft"
    training(folder, process)
    for number in signals:
        process.send_signal(number)
        time.sleep(1.2 if len(signals) > 1 else 0)
    shown, _ = process.communicate(timeout=240)
    assert process.returncode == code, shown
    assert statuses(folder) == ["RUNNING", "KILLED"]
    assert len(signals) > 1 or newest(folder) == steps(folder)[-1]


def test_under_torchrun_all_ranks_write_the_checkpoint(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch.cli"]
    process = python(tmp_path, *launcher, *STAGE, *FILES)
    folder = tmp_path / "runs/smoke/sft"
    training(folder, process)
    os.killpg(process.pid, signal.SIGTERM)  # torchrun passes it on to ranks that have it already
    shown, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"stopped by SIGTERM after step {newest(folder)}, with a checkpoint" in shown
    assert newest(folder) == steps(folder)[-1]
    assert statuses(folder) == ["RUNNING", "KILLED"]

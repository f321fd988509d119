"""A run whose process was killed is closed by the next command; one whose process lives is left alone."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf.config import TrackingConfig
from rlhf.tracking import abandoned, close_abandoned, open_tracker
from tests.rlhf.tracking.recorded import FILES_ONLY, NOBODY_LISTENS, ROOT, finished

OPEN_AND_WAIT = """
import sys, time
from pathlib import Path
from rlhf.config import TrackingConfig
from rlhf.tracking import open_tracker
uri = sys.argv[1] if sys.argv[1] != "none" else None
settings, folders = TrackingConfig(uri=uri, experiment="tests"), [Path(name) for name in sys.argv[2:]]
open_trackers = [open_tracker(f, settings, f.name, "" if n else None, is_writer=True) for n, f in enumerate(folders)]
while uri and not all(tracker.run_id for tracker in open_trackers):
    time.sleep(0.1)
print("open", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start():
    """start(settings, folder, nested folder…): a process with an open run in each."""
    processes = []

    def run(settings, *folders):
        command = [sys.executable, "-c", OPEN_AND_WAIT, settings.uri or "none", *map(str, folders)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout and process.stdout.readline() == "open\n"
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


def killed(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def last_event(folder):
    return json.loads((folder / "events.jsonl").read_text().splitlines()[-1])


def test_a_killed_run_and_its_stage_are_closed_in_mlflow(tmp_path, store, store_client, start):
    process = start(store, tmp_path / "alone", tmp_path / "alone/reward/safety")
    killed(process)
    experiment = store_client.get_experiment_by_name("tests").experiment_id
    ids = {
        run.info.run_name: run.info.run_id
        for run in store_client.search_runs([experiment], "attributes.status = 'RUNNING'")
    }
    close_abandoned(tmp_path, store)
    deadline = time.monotonic() + 60
    while {store_client.get_run(ids[name]).info.status for name in ("alone", "safety")} != {"KILLED"}:
        assert time.monotonic() < deadline, "still open in MLflow"
        time.sleep(0.2)
    assert store_client.get_run(ids["safety"]).data.tags["failure.reason"] == abandoned.REASON


def test_a_run_whose_process_lives_is_left_alone(tmp_path, start):
    start(FILES_ONLY, tmp_path / "alone")
    close_abandoned(tmp_path, FILES_ONLY)
    assert last_event(tmp_path / "alone")["event"] != "status"
    assert '"KILLED"' not in (tmp_path / "alone/events.jsonl").read_text()


@pytest.mark.parametrize("part", ["", "sft", "reward/safety"])
def test_a_killed_run_is_closed_in_its_files_without_mlflow(tmp_path, start, part):
    killed(start(FILES_ONLY, tmp_path / "alone" / part))
    began = time.monotonic()
    close_abandoned(tmp_path, NOBODY_LISTENS)  # it is not waited for
    assert time.monotonic() - began < 1
    event = last_event(tmp_path / "alone" / part)
    assert (event["status"], event["reason"]) == ("KILLED", abandoned.REASON)


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_that_ended_is_left_as_it_is(tmp_path, status):
    open_tracker(tmp_path / "alone", FILES_ONLY, "first", None, is_writer=True).close(status)
    before = (tmp_path / "alone/events.jsonl").read_text()
    close_abandoned(tmp_path, FILES_ONLY)
    assert (tmp_path / "alone/events.jsonl").read_text() == before


def test_a_file_system_without_locks_closes_nothing(tmp_path, start, monkeypatch):
    killed(start(FILES_ONLY, tmp_path / "alone"))

    def no_locks(*_):
        raise OSError(45, "not supported")

    monkeypatch.setattr("rlhf.tracking.jsonl.fcntl.flock", no_locks)
    close_abandoned(tmp_path, FILES_ONLY)
    assert '"KILLED"' not in (tmp_path / "alone/events.jsonl").read_text()


def test_a_run_that_goes_on_after_it_was_closed_can_finish(tmp_path, start):
    killed(start(FILES_ONLY, tmp_path / "alone"))
    close_abandoned(tmp_path, FILES_ONLY)
    finished(tmp_path / "alone", TrackingConfig(uri=None))
    assert last_event(tmp_path / "alone")["status"] == "FINISHED"

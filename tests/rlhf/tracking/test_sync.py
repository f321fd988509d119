"""Resumed runs, and runs whose MLflow is down, slow or gone: nothing is lost, sent twice or waited for."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import tracking
from rlhf.config import TrackingConfig
from rlhf.errors import UserError
from rlhf.tracking import jsonl, mlflow_client, mlflow_sync, open_parent, open_tracker
from tests.rlhf.tracking.recorded import FILES_ONLY, NOBODY_LISTENS, ROOT, file_of_run, finished

# --- a stage that goes on ---------------------------------------------------------------------------------------------


def steps_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder: Path, settings: TrackingConfig, steps: range, value: float, rewound_to: int | None = None) -> str:
    tracker = open_tracker(folder, settings, "stage", None, is_writer=True)
    if rewound_to is not None:
        tracker.rewind(rewound_to)
    for step in steps:
        tracker.metrics({"eval/kl": value}, step)
        tracker.metrics({"loss": value}, step)
    tracker.close()
    return tracker.run_id or ""


@pytest.mark.parametrize(("step", "left"), [(2, [1, 1, 2, 2]), (-1, []), (9, [1, 1, 2, 2, 3, 3, 4, 4])])
def test_metrics_after_the_checkpoint_are_dropped(tmp_path, step, left):
    record(tmp_path, FILES_ONLY, range(1, 5), 0.5)
    record(tmp_path, FILES_ONLY, range(0), 0.5, rewound_to=step)
    assert steps_of(tmp_path) == left


def test_so_is_a_line_that_was_left_half_written(tmp_path):
    record(tmp_path, FILES_ONLY, range(1, 3), 0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    record(tmp_path, FILES_ONLY, range(3, 4), 0.5, rewound_to=2)
    assert steps_of(tmp_path) == [1, 1, 2, 2, 3, 3]


def test_mlflow_gets_no_step_twice(tmp_path, store, store_client):
    first = record(tmp_path, store, range(1, 5), 0.5)
    second = record(tmp_path, store, range(3, 7), 0.5, rewound_to=2)
    assert first == second and steps_of(tmp_path) == [step for step in range(1, 7) for _ in range(2)]
    for name in ("loss", "eval/kl"):
        assert [point.step for point in store_client.get_metric_history(first, name)] == [1, 2, 3, 4, 5, 6]


def test_mlflow_gets_what_it_missed_once(tmp_path, store, store_client, monkeypatch):
    monkeypatch.setattr(mlflow_sync, "RETRY_S", 0.0)
    record(tmp_path, NOBODY_LISTENS, range(1, 5), 0.5)
    run_id = record(tmp_path, store, range(3, 5), 0.25, rewound_to=2)
    # Steps 3 and 4 as first made or as made again: the sender may be quicker than the rewind.
    assert [point.step for point in store_client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4]


def test_a_rewind_that_was_killed_can_be_done_again(tmp_path, store, store_client, monkeypatch):
    run_id = record(tmp_path, store, range(1, 5), 0.5)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlflow_sync.os, "truncate", killed)
        mlflow_sync.rewind(tmp_path, 2)
    record(tmp_path, store, range(3, 6), 0.5, rewound_to=2)
    assert [point.step for point in store_client.get_metric_history(run_id, "loss")] == [1, 2, 3, 4, 5]
    assert steps_of(tmp_path) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_rows_of_a_table_that_are_made_again_are_not_added_again(tmp_path, store, store_client):
    finished(tmp_path, store, table=("samples", [{"iteration": 1, "score": 0.5}]))
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.table("samples", [{"iteration": 1, "score": 0.5}])
    tracker.table("samples", [{"iteration": 2, "score": 0.5}])
    tracker.close()
    assert json.loads(file_of_run(store_client, tracker.run_id, "samples.json"))["data"] == [[1, 0.5], [2, 0.5]]


# --- while a stage runs -----------------------------------------------------------------------------------------------


def test_a_running_stage_is_followed_before_it_ends(tmp_path, store, store_client, monkeypatch):
    monkeypatch.setattr(mlflow_sync, "POLL_S", 0.05)
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.metrics({"loss": 2.0}, 1)
    deadline = time.monotonic() + 10
    while not (tracker.run_id and store_client.get_run(tracker.run_id).data.metrics):
        assert time.monotonic() < deadline, "nothing arrived while the run was open"
        time.sleep(0.05)
    assert store_client.get_run(tracker.run_id).info.status == "RUNNING"
    tracker.close()


def test_system_metrics_of_a_nested_run_arrive(tmp_path, store, store_client, monkeypatch):
    monkeypatch.setattr(mlflow_sync, "POLL_S", 0.05)
    monkeypatch.setattr(mlflow_client, "SYSTEM_SAMPLE_S", 0.1)
    parent = finished(tmp_path, store)
    tracker = open_tracker(tmp_path / "sft", store, "sft", parent, is_writer=True)
    time.sleep(1.5)
    tracker.close()
    assert "system/cpu_utilization_percentage" in store_client.get_run(tracker.run_id).data.metrics


def test_a_dead_server_costs_no_time_and_loses_nothing(tmp_path, store, store_client, caplog):
    parent = open_parent(tmp_path, NOBODY_LISTENS, "pipeline", "digest")
    stage = open_tracker(tmp_path / "sft", NOBODY_LISTENS, "sft", "", is_writer=True)
    start = time.monotonic()
    for step in range(500):
        stage.metrics({"sft/loss": float(step)}, step)
    stage.params({"seed": 1})
    assert time.monotonic() - start < 1.0
    start = time.monotonic()
    stage.close("FAILED", "out of memory")
    parent.close("FAILED", "sft failed")
    assert time.monotonic() - start < 2 * mlflow_sync.CLOSE_LIMIT_S
    assert len(caplog.messages) == 2 and "does not have all" in caplog.messages[0]
    assert len((tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()) == 500
    assert (stage.run_id, parent.run_id) == (None, None)

    assert tracking.fill_in(tmp_path, store)
    run = store_client.get_run(stage.run_id)
    assert (run.info.status, run.info.run_name) == ("FAILED", "sft")
    assert run.data.params == {"seed": "1"}
    assert (run.data.tags["mlflow.parentRunId"], run.data.tags["failure.reason"]) == (parent.run_id, "out of memory")
    assert len(store_client.get_metric_history(stage.run_id, "sft/loss")) == 500


def test_a_server_that_never_answers_holds_nobody_up(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_sync, "CLOSE_LIMIT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        settings = TrackingConfig(uri=f"http://127.0.0.1:{listening.getsockname()[1]}")
        tracker = open_tracker(tmp_path, settings, "stage", None, is_writer=True)
        start = time.monotonic()
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close()
        assert time.monotonic() - start < 2.0
    assert len(caplog.messages) == 1 and "not done within" in caplog.messages[0]


def test_fill_in_from_a_server_that_is_still_down_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mlflow_sync, "RETRY_S", 0.0)
    finished(tmp_path, FILES_ONLY)
    assert not tracking.fill_in(tmp_path, NOBODY_LISTENS)
    assert len(caplog.messages) == 1 and "127.0.0.1:9" in caplog.messages[0]


def test_fill_in_again_sends_nothing_twice(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({"loss": 1.0}, 1), table=("samples", [{"a": 1}]))
    assert tracking.fill_in(tmp_path, store)
    assert len(store_client.get_metric_history(run_id, "loss")) == 1
    assert json.loads(file_of_run(store_client, run_id, "samples.json"))["data"] == [[1]]


def test_a_run_deleted_in_mlflow_is_made_anew_with_everything(tmp_path, store, store_client):
    first = finished(tmp_path, store, metrics=({"loss": 1.0}, 1))
    store_client.delete_run(first)
    second = finished(tmp_path, store, metrics=({"loss": 0.5}, 2))
    assert second != first
    assert len(store_client.get_metric_history(second, "loss")) == 2


def test_what_mlflow_refuses_is_left_out_and_the_rest_arrives(tmp_path, store, store_client, monkeypatch, caplog):
    monkeypatch.setattr(mlflow_sync, "RETRY_S", 0.0)
    run_id = finished(tmp_path, store, table=("../outside", [{"a": 1}]), metrics=({"loss": 1.0}, 1))
    run = store_client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert len(caplog.messages) == 1 and "did not take table" in caplog.messages[0]


def test_a_killed_run_is_marked_failed_by_the_driver(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, FILES_ONLY, "stage", None, is_writer=True)
    tracking.mark_ended(tmp_path, "FAILED", "worker died")
    assert tracking.fill_in(tmp_path, store)
    run = store_client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["failure.reason"]) == ("FAILED", "worker died")


def test_a_run_that_ended_by_itself_is_not_marked(tmp_path):
    finished(tmp_path, FILES_ONLY)
    before = (tmp_path / "events.jsonl").read_text()
    tracking.mark_ended(tmp_path, "FAILED", "worker died")
    assert (tmp_path / "events.jsonl").read_text() == before


def test_without_a_uri_files_are_written_and_no_thread_starts(tmp_path):
    threads = threading.active_count()
    tracker = open_tracker(tmp_path, FILES_ONLY, "stage", None, is_writer=True)
    assert threading.active_count() == threads
    tracker.metrics({"loss": 1.5}, step=3)
    tracker.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"step": 3, "loss": 1.5}.items()


def test_other_ranks_write_nothing(tmp_path, store):
    tracker = open_tracker(tmp_path / "sft", store, "sft", "", is_writer=False)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.close("FAILED", "reason")
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_line_is_closed_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1, "loss": 2.0}\n{"step": 2, "ti')
    tracker = open_tracker(tmp_path, FILES_ONLY, "stage", None, is_writer=True)
    tracker.metrics({"loss": 1.0}, 2)
    tracker.close()
    assert tracking.read_metrics(tmp_path) == {"loss": [(1, 2.0), (2, 1.0)]}


def test_a_line_that_is_still_being_written_waits(tmp_path):
    whole = '{"step": 1}\n'
    (tmp_path / "a.jsonl").write_text(whole + '{"step": 2}')
    assert list(jsonl.read_lines(tmp_path / "a.jsonl")) == [({"step": 1}, len(whole))]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(allow_nan=False, allow_infinity=False)), max_size=20))
def test_the_later_value_of_a_repeated_step_counts(tmp_path_factory, points):
    folder = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps({"step": step, "time": 0, "loss": value}) + "\n" for step, value in points)
    (folder / "metrics.jsonl").write_text(text)
    assert tracking.read_metrics(folder).get("loss", []) == sorted(dict(points).items())


def test_a_full_disk_is_reported(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    with pytest.raises(UserError, match="disk is full") as caught:
        jsonl.Lines(Path("/dev/full")).append({"loss": 1.0})
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("https://me:secret@host/path", "https://host/path"),
        ("postgresql://me:secret@host/db", "postgresql://host/db"),
        ("https://me:se@cr:et@host/a@b", "https://host/a@b"),
        (
            "postgresql://host/db?user=me&password=secret&sslmode=on",
            "postgresql://host/db?user=me&password=***&sslmode=on",
        ),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///mlflow.db", f"sqlite:///{Path.cwd()}/mlflow.db"),
        ("sqlite://", "sqlite://"),
        ("databricks", "databricks"),
    ],
)
def test_public_uri_is_absolute_and_holds_no_password(uri, shown):
    assert tracking.public_uri(uri) == shown


def test_import_is_light():
    code = "import sys, rlhf.tracking; print([m for m in ('torch', 'mlflow', 'pandas') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == "[]"

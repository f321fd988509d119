"""The files hold everything at once; MLflow holds the same as soon as it can; training notices neither."""

import json
import math
import os
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
from rlhf.tracking import base as tracker_module
from rlhf.tracking import jsonl, mlflow_client, mlflow_sync, open_parent, open_tracker

NOBODY_LISTENS = TrackingConfig(uri="http://127.0.0.1:9")
FILES_ONLY = TrackingConfig(uri=None)
ROOT = Path(tracking.__file__).parents[2]

TRACK_ONE_RUN = """
import sys
from pathlib import Path
from rlhf.config import TrackingConfig
from rlhf.tracking import mlflow_sync, open_tracker
mlflow_sync.CLOSE_LIMIT_S = 120
tracker = open_tracker(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2], experiment="tests"), "first", None, is_writer=True)
tracker.metrics({"loss": 1.0}, step=0)
tracker.close()
"""


@pytest.fixture(scope="session")
def first_use(tmp_path_factory):
    """Two processes that start on a store that is not there yet: its settings, and what they printed."""
    folder = tmp_path_factory.mktemp("store")
    settings = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="tests")
    commands = [[sys.executable, "-c", TRACK_ONE_RUN, folder / name, settings.uri or ""] for name in ("one", "two")]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, cwd=folder, env=environment, **output) for command in commands]
    return settings, [process.communicate()[0] for process in processes]


@pytest.fixture(scope="session")
def store(first_use):
    return first_use[0]


@pytest.fixture
def store_client(store):
    from mlflow import MlflowClient

    return MlflowClient(store.uri)


def finished(folder: Path, settings: TrackingConfig, **calls) -> str:
    """The run id of a run on which the given methods were called."""
    tracker = open_tracker(folder, settings, "stage", None, is_writer=True)
    for method, arguments in calls.items():
        getattr(tracker, method)(*arguments)
    tracker.close()
    return tracker.run_id or ""


def file_of_run(store_client, run_id, name) -> str:
    return Path(store_client.download_artifacts(run_id, name)).read_text()


def test_two_processes_can_create_one_store_without_a_word(first_use):
    assert first_use[1] == ["", ""]


def test_their_runs_are_in_that_store(store, store_client):
    runs = store_client.search_runs([store_client.get_experiment_by_name("tests").experiment_id])
    first = [run for run in runs if run.info.run_name == "first"]
    assert [(run.info.status, run.data.metrics) for run in first] == [("FINISHED", {"loss": 1.0})] * 2


def test_files_of_a_sqlite_store_lie_beside_it(store, store_client):
    location = store_client.get_experiment_by_name("tests").artifact_location
    assert location == (Path(store.uri.removeprefix("sqlite:///")).parent / "mlruns").as_uri()


def test_metrics_arrive_with_their_steps(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    for step in range(130):  # more than one call to MLflow
        tracker.metrics({"sft/loss": 1 / (step + 1)}, step)
    tracker.close()
    history = store_client.get_metric_history(tracker.run_id, "sft/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / (step + 1)) for step in range(130)]


def test_a_line_of_more_metrics_than_one_call_takes_arrives(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({f"m{number}": number for number in range(1100)}, 1))
    assert len(store_client.get_run(run_id).data.metrics) == 1100


def test_a_metric_that_is_not_finite_arrives_as_nan(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({"sft/loss": math.inf}, 1))
    assert math.isnan(store_client.get_run(run_id).data.metrics["sft/loss"])


def test_a_metric_name_that_mlflow_forbids_is_rewritten(tmp_path, store, store_client):
    run_id = finished(tmp_path, store, metrics=({"eval/größe?": 2.0}, 1))
    assert store_client.get_run(run_id).data.metrics == {"eval/gr__e_": 2.0}


def test_params_are_flat_and_cut_to_the_limit(tmp_path, store, store_client):
    many = {f"key{number}": number for number in range(250)}
    run_id = finished(tmp_path, store, params=({"ppo": {"optim": {"lr": 1e-6}}, "long": "x" * 7000, **many},))
    params = store_client.get_run(run_id).data.params
    assert params["ppo.optim.lr"] == "1e-06"
    assert params["long"] == "x" * 6000
    assert len(params) == 252


def test_a_changed_param_of_a_resumed_run_keeps_its_value_and_the_rest_arrives(tmp_path, store, store_client):
    first = finished(tmp_path, store, params=({"lr": 1},))
    second = finished(tmp_path, store, params=({"lr": 2, "new": 3},), metrics=({"loss": 0.5}, 7))
    run = store_client.get_run(first)
    assert second == first
    assert (run.data.params, run.data.metrics) == ({"lr": "1", "new": "3"}, {"loss": 0.5})


def test_dataset_arrives_with_digest_and_role(tmp_path, store, store_client):
    digest = "0123456789abcdef" * 4
    run_id = finished(tmp_path, store, dataset=("preferences", "data/pairs.jsonl", digest, "held_out"))
    (entry,) = store_client.get_run(run_id).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("preferences", digest[:36])
    assert {tag.key: tag.value for tag in entry.tags} == {"mlflow.data.context": "held_out", "sha256": digest}


def test_rows_of_a_table_are_added_to_earlier_ones(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.table("samples", [{"prompt": "a", "answer": "b"}])
    tracker.table("samples", [{"prompt": "c", "score": 1}])
    tracker.close()
    table = json.loads(file_of_run(store_client, tracker.run_id, "samples.json"))
    assert table["columns"] == ["prompt", "answer", "score"]
    assert table["data"] == [["a", "b", None], ["c", None, 1.0]]


def test_a_file_arrives(tmp_path, store, store_client):
    (tmp_path / "config.yaml").write_text("seed: 1")
    run_id = finished(tmp_path / "run", store, artifact=(tmp_path / "config.yaml",))
    assert file_of_run(store_client, run_id, "config.yaml") == "seed: 1"


def test_code_revision_and_diff_are_recorded(tmp_path, store, store_client, monkeypatch):
    monkeypatch.setattr(tracker_module, "code_revision", lambda: "abc+changes")
    monkeypatch.setattr(tracker_module, "code_diff", lambda: "-old\n+new\n")
    run_id = finished(tmp_path, store)
    tags = store_client.get_run(run_id).data.tags
    assert (tags["git.revision"], tags["mlflow.source.git.commit"]) == ("abc+changes", "abc")
    assert file_of_run(store_client, run_id, "git.diff") == "-old\n+new\n"


@pytest.mark.parametrize("given", ["", "made by an MLflow that is gone"])
def test_a_nested_run_finds_its_parent_in_the_folder_above(tmp_path, store, store_client, given):
    parent = finished(tmp_path, store)
    child = open_tracker(tmp_path / "reward" / "safety", store, "reward/safety", given, is_writer=True)
    child.close()
    assert store_client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent


def test_a_nested_run_without_a_folder_above_takes_the_given_parent(tmp_path, store, store_client):
    parent = finished(tmp_path / "pipeline", store)
    child = open_tracker(tmp_path / "elsewhere", store, "sft", parent, is_writer=True)
    child.close()
    assert store_client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent


def test_a_failed_run_says_why(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.close("FAILED", "loss is NaN at step 7")
    run = store_client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["failure.reason"]) == ("FAILED", "loss is NaN at step 7")


def test_a_run_that_goes_on_and_finishes_has_no_failure_any_more(tmp_path, store, store_client):
    open_tracker(tmp_path, store, "stage", None, is_writer=True).close("FAILED", "killed")
    run = store_client.get_run(finished(tmp_path, store))
    assert (run.info.status, run.data.tags.get("failure.reason")) == ("FINISHED", None)


def test_a_second_close_changes_nothing(tmp_path, store, store_client):
    tracker = open_tracker(tmp_path, store, "stage", None, is_writer=True)
    tracker.close("FAILED", "first")
    tracker.close("FINISHED")
    assert store_client.get_run(tracker.run_id).info.status == "FAILED"


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
    parent = open_parent(tmp_path, NOBODY_LISTENS, "pipeline")
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
    tracking.mark_failed(tmp_path, "worker died")
    assert tracking.fill_in(tmp_path, store)
    run = store_client.get_run(tracker.run_id)
    assert (run.info.status, run.data.tags["failure.reason"]) == ("FAILED", "worker died")


def test_a_run_that_ended_by_itself_is_not_marked(tmp_path):
    finished(tmp_path, FILES_ONLY)
    before = (tmp_path / "events.jsonl").read_text()
    tracking.mark_failed(tmp_path, "worker died")
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

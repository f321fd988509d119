"""Turns lines of the JSONL files into calls of MLflow. MLflow is imported at first use."""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf.config import TrackingConfig, without_secrets
from rlhf.errors import UserError
from rlhf.tracking.logged_models import MAX_DIGEST, send_measured, send_model
from rlhf.tracking.registry import send_version

MAX_METRICS, MAX_PARAMS, MAX_TAGS = 1000, 100, 100  # MLflow's limits for one call
MAX_PARAM, MAX_TAG = 6000, 8000  # MLflow's limits, characters
PARENT = "mlflow.parentRunId"  # tag
SYSTEM_SAMPLE_S = 5
FAILURE = "failure.reason"
ENVIRONMENT = {  # give up early on a server that is down; print nothing
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def absolute_uri(uri: str) -> str:
    """`uri`, with a relative SQLite path made absolute: workers have other working folders."""
    database = database_of(uri)
    return uri if database is None else f"sqlite:///{database.absolute()}"


def public_uri(uri: str) -> str:
    """`uri` as it may be shown and stored: absolute, and without a password."""
    return without_secrets(absolute_uri(uri))


OUTAGES = {  # MLflow's error codes
    *("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "SERVICE_UNDER_MAINTENANCE"),
    *("REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"),
}
OUTAGE = re.compile(
    r"failed with (exception|error code (401|403|408|429|5\d\d))|timed out|too many 5\d\d|max retries|"
    r"database (table )?is locked|connection (refused|reset|aborted)|disk I/O error|unable to open database",
    re.IGNORECASE,
)


def is_outage(error: BaseException) -> bool:
    """Whether MLflow may take the same content later: it was down, slow, locked, or did not know who we are."""
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError)  # connections that fail are OSErrors too
    return getattr(error, "error_code", "") in OUTAGES or OUTAGE.search(str(error)) is not None


EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens with training runs


VIEW = "mlflow.sharedViewState.rlhf"  # opened by ?viewStateShareKey=rlhf, or from the menu Views
COLUMNS = {
    "params": ("ppo.kl_coef", "ppo.optim.lr", "seed"),
    "metrics": (
        *(f"eval/ppo/{name}" for name in ("reward_helpfulness", "reward_safety", "gold", "kl", "length", "eos_rate")),
        *(f"eval/accuracy_{name}" for name in ("helpfulness", "safety")),
    ),
}


class Client:
    def __init__(self, settings: TrackingConfig) -> None:
        assert settings.uri is not None
        self._uri, self._experiment = absolute_uri(settings.uri), settings.experiment
        import_quietly()
        if (database := database_of(self._uri)) and not database.exists():
            _make_database(database)
        from mlflow import MlflowClient

        self._mlflow = MlflowClient(tracking_uri=self._uri)

    def experiment_id(self) -> str:
        """The experiment, created if it does not exist."""
        from mlflow.exceptions import MlflowException

        if found := self._mlflow.get_experiment_by_name(self._experiment):
            if VIEW not in found.tags:
                self._mlflow.set_experiment_tag(found.experiment_id, VIEW, _view())
            return found.experiment_id
        database = database_of(self._uri)
        files = None if database is None else (database.parent / "mlruns").as_uri()  # not in the working folder
        try:
            return self._mlflow.create_experiment(
                self._experiment, artifact_location=files, tags={**EXPERIMENT_TAGS, VIEW: _view()}
            )
        except MlflowException:
            if found := self._mlflow.get_experiment_by_name(self._experiment):  # another process was quicker
                return found.experiment_id
            raise

    def create_run(self, name: str, parent_run_id: str | None, started: float) -> str:
        """The id of a new run; `started` in seconds since 1970."""
        tags = {"mlflow.source.name": "rlhf", "mlflow.source.type": "LOCAL"}
        with suppress(OSError, KeyError):  # a container may have no user name
            tags["mlflow.user"] = getpass.getuser()
        if parent_run_id:
            tags[PARENT] = parent_run_id
        return self._mlflow.create_run(self.experiment_id(), int(1000 * started), tags, name).info.run_id

    def has_run(self, run_id: str) -> bool:
        """False if the run was deleted or the store is new."""
        from mlflow.exceptions import MlflowException

        try:
            return self._mlflow.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def send_metrics(self, run_id: str, lines: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_name(key), float("nan") if value is None else value, int(1000 * line["time"]), int(line["step"]))
            for line in lines
            for key, value in line.items()
            if key not in ("step", "time")
        ]
        for part in _parts(metrics, MAX_METRICS):
            self._mlflow.log_batch(run_id, metrics=part)

    def send_event(self, run_id: str, event: Mapping[str, Any]) -> None:
        match event:
            case {"event": "params", "values": values}:
                self._send_params(run_id, values)
            case {"event": "tags", "values": values}:
                self._send_tags(run_id, values)
            case {"event": "dataset"}:
                self._mlflow.log_inputs(run_id, [_dataset_input(event)])
            case {"event": "table", "name": name, "rows": rows}:
                columns = dict.fromkeys(key for row in rows for key in row)
                table = {column: [row.get(column) for row in rows] for column in columns}
                self._mlflow.log_table(run_id, table, f"{name}.json")
            case {"event": "model"}:
                model_id = send_model(self._mlflow, run_id, event)
                if "registered" in event:  # not in what an older version wrote
                    send_version(self._mlflow, run_id, model_id, event)
                send_measured(self._mlflow, run_id, event)
            case {"event": "artifact", "path": path} if Path(path).exists():
                self._mlflow.log_artifact(run_id, path)
            case {"event": "status"}:
                self._send_status(run_id, event)

    def watch_system(self, run_id: str) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, SYSTEM_SAMPLE_S, resume_logging=True, tracking_uri=self._uri)
        monitor.start()
        return monitor

    def _send_params(self, run_id: str, values: Mapping[str, Any]) -> None:
        """MLflow's parameters are immutable, so those of a resumed run stay as they are."""
        from mlflow.entities import Param

        known = self._mlflow.get_run(run_id).data.params
        params = [Param(_name(key), value[:MAX_PARAM]) for key, value in flatten(values) if _name(key) not in known]
        for part in _parts(params, MAX_PARAMS):
            self._mlflow.log_batch(run_id, params=part)

    def _send_tags(self, run_id: str, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        for part in _parts([RunTag(_name(key), str(value)[:MAX_TAG]) for key, value in values.items()], MAX_TAGS):
            self._mlflow.log_batch(run_id, tags=part)

    def _send_status(self, run_id: str, event: Mapping[str, Any]) -> None:
        if event["status"] == "RUNNING":
            self._mlflow.update_run(run_id, status="RUNNING")
            if FAILURE in self._mlflow.get_run(run_id).data.tags:  # of the attempt before
                self._mlflow.delete_tag(run_id, FAILURE)
            return
        if event["reason"]:
            self._mlflow.set_tag(run_id, FAILURE, event["reason"][:MAX_TAG])
        self._mlflow.set_terminated(run_id, event["status"], int(1000 * event["time"]))


def open_store(uri: str, option: str) -> Any:
    """MLflow's own client of a store that exists. `option`: what named it. UserError (4) for a file that does not."""
    if (database := database_of(absolute_uri(uri))) and not database.exists():
        raise UserError(f"{option}: there is no file {database}", 4)
    import_quietly()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=absolute_uri(uri))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """{"ppo": {"optim": {"lr": 1e-6}}} -> ("ppo.optim.lr", "1e-06")."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _view() -> str:
    """The columns of the run table, as the UI saves a view of it."""
    names = [f"{kind}.`{name}`" for kind, group in COLUMNS.items() for name in group]
    now = int(1000 * time.time())
    state = json.dumps({"selectedColumns": ["attributes.`Created`", *names], "columnOrder": names})
    return json.dumps({"name": "Results", "createdAt": now, "updatedAt": now, "state": state})


def _dataset_input(event: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(event["name"], event["digest"][:MAX_DIGEST], "local", json.dumps({"uri": event["path"]}))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["role"]), InputTag("sha256", event["digest"])])


def import_quietly() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=r"(mlflow|alembic|sqlalchemy)\b")
    import mlflow  # noqa: F401 - it sets up its loggers, so they are silenced after it

    for library in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(library).setLevel(logging.CRITICAL)


def _make_database(database: Path) -> None:
    """A new SQLite store, by rename: MLflow fills it in 60 steps and cannot repair a partial one."""
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.parent), TemporaryDirectory() as elsewhere:
        if database.exists():  # another process was quicker
            return
        MlflowClient(f"sqlite:///{elsewhere}/new.db").search_experiments()
        partial = database.with_name(f".{database.name}.partial")
        with closing(sqlite3.connect(f"{elsewhere}/new.db")) as new, closing(sqlite3.connect(partial)) as copy:
            new.backup(copy)
        partial.replace(database)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """An exclusive lock on a file or folder; without `wait`, BlockingIOError if another process or thread has it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def database_of(uri: str) -> Path | None:
    path = uri.removeprefix("sqlite:///")
    return None if path == uri or not path or path.startswith(":") else Path(path)


def _name(key: str) -> str:
    """`key` in the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII)


def _parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

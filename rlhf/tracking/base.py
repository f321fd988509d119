"""What stages and the driver call to record a run. Every call writes to a file and returns without waiting for MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf.config import TrackingConfig, without_secrets
from rlhf.errors import UserError
from rlhf.runs.artifacts import code_diff, code_revision, plain, write_atomic
from rlhf.tracking.jsonl import Lines, read_lines
from rlhf.tracking.mlflow_client import locked
from rlhf.tracking.mlflow_sync import EVENTS, METRICS, STATE, SyncState, SyncThread, fill_in_behind, rewind

Status = Literal["FINISHED", "FAILED", "KILLED"]
PROVENANCE = "provenance"


class Tracker(Protocol):
    @property
    def run_id(self) -> str | None: ...  # of the MLflow run, None while there is none
    def params(self, values: Mapping[str, Any]) -> None: ...  # nested mappings become dotted names
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def rewind(self, step: int) -> None: ...  # drops the metrics after `step`; the stage makes them again
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...  # added to earlier rows of that name
    def dataset(self, name: str, path: str, digest: str, role: str) -> None: ...
    def artifact(self, path: Path) -> None: ...  # a small file, for instance a plot; never weights
    def model(self, model: Mapping[str, Any]) -> None: ...  # see `mlflow_client.Client.send_event`; weights stay
    def close(self, status: Status = "FINISHED", reason: str = "") -> None: ...


def open_tracker(
    folder: Path, settings: TrackingConfig, run_name: str, parent_run_id: str | None, is_writer: bool
) -> Tracker:
    """The tracker of one run. If the run exists, it continues in the same files and the same MLflow run.

    `parent_run_id` None: a top-level run. "": a nested run, whose parent is looked up in the folders above once it exists.
    """
    if not is_writer:
        return NullTracker()
    folder.mkdir(parents=True, exist_ok=True)
    SyncState.open(folder, run_name, parent_run_id)
    return FileTracker(folder, settings, watch_system=parent_run_id is not None)


def open_parent(folder: Path, settings: TrackingConfig, run_name: str, provenance: str) -> Tracker:
    """The tracker of a pipeline. Its `run_id` appears when its thread has reached MLflow; do not wait for it.

    In the folder of a sweep it is nested below the sweep's. `provenance` is a digest of settings and data. If it has
    changed, a new MLflow run starts, because MLflow cannot change the parameters of the earlier one.
    """
    tags = [event["values"] for event, _ in read_lines(folder / EVENTS) if event["event"] == "tags"]
    earlier = next((values[PROVENANCE] for values in reversed(tags) if PROVENANCE in values), provenance)
    if earlier != provenance:
        keep_earlier(folder, settings, new=True)
    folder.mkdir(parents=True, exist_ok=True)
    SyncState.open(folder, run_name, parent_run_id="" if (folder.parent / STATE).exists() else None)
    tracker = FileTracker(folder, settings, watch_system=False)
    tracker.tags({PROVENANCE: provenance})
    return tracker


def keep_earlier(folder: Path, settings: TrackingConfig, part: str = "", new: bool = False) -> None:
    """Moves the files of the run in `folder / part` to `folder/earlier/<number>`, and uploads the rest of them from there.

    `new`: under a number of its own; otherwise beside the parent that was moved last.
    """
    if not (folder / part / STATE).exists():
        return
    last = max((int(path.name) for path in (folder / "earlier").glob("[0-9]*")), default=0)
    target = folder / "earlier" / str(last + 1 if new or not last else last) / part
    target.mkdir(parents=True, exist_ok=True)
    with locked(folder / part):  # waits while an upload runs
        for name in (METRICS, EVENTS, STATE):
            if (folder / part / name).exists():
                (folder / part / name).replace(target / name)
    fill_in_behind([target], settings)


def mark_ended(folder: Path, status: Status, reason: str) -> bool:
    """Records how the run in `folder` ended, if its process died too early to do so. `fill_in` uploads it."""
    states = [event["status"] for event, _ in read_lines(folder / EVENTS) if event["event"] == "status"]
    if not states or states[-1] != "RUNNING":
        return False
    events = Lines(folder / EVENTS)
    events.append({"event": "status", "status": status, "reason": without_secrets(reason)})
    events.close()
    return True


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric in `folder`, by step; if a step was recorded twice, the later value."""
    series: dict[str, dict[int, float]] = {}
    for line, _ in read_lines(folder / METRICS):
        for name, value in line.items():
            if name not in ("step", "time") and value is not None:
                series.setdefault(name, {})[line["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def read_lines_of(folder: Path, names: Sequence[str]) -> list[dict[str, float]]:
    """`step`, `time` and the metrics `names` of every step that has one of them; a step that was repeated, once."""
    lines = {line["step"]: line for line, _ in read_lines(folder / METRICS) if not line.keys().isdisjoint(names)}
    return [{key: line[key] for key in ("step", "time", *names) if key in line} for _, line in sorted(lines.items())]


def status_of(error: BaseException) -> Status:
    """How a run ended that `error` ended."""
    is_stop = isinstance(error, KeyboardInterrupt) or (isinstance(error, UserError) and error.is_stop)
    return "KILLED" if is_stop else "FAILED"


class NullTracker:
    """On ranks that do not write."""

    run_id = None

    def params(self, values: Mapping[str, Any]) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def rewind(self, step: int) -> None: ...
    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None: ...
    def dataset(self, name: str, path: str, digest: str, role: str) -> None: ...
    def artifact(self, path: Path) -> None: ...
    def model(self, model: Mapping[str, Any]) -> None: ...
    def close(self, status: Status = "FINISHED", reason: str = "") -> None: ...


class FileTracker:
    """Appends to the folder's JSONL files; with a tracking URI, a thread uploads them."""

    def __init__(self, folder: Path, settings: TrackingConfig, watch_system: bool) -> None:
        self._folder = folder
        self._metrics, self._events = Lines(folder / METRICS), Lines(folder / EVENTS, hold=True)
        self._is_open = True
        self._event("status", status="RUNNING", reason="")
        self._record_code()
        self._sync = None if settings.uri is None else SyncThread(folder, settings, watch_system)

    @property
    def run_id(self) -> str | None:
        return SyncState.load(self._folder).run_id

    def params(self, values: Mapping[str, Any]) -> None:
        self._event("params", values=values)

    def tags(self, values: Mapping[str, str]) -> None:
        self._event("tags", values=values)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """`time` among the values stands for the time of another record; otherwise it is now."""
        self._metrics.append({"step": step, **values})

    def rewind(self, step: int) -> None:
        rewind(self._folder, step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A resumed stage makes the same rows again; they are not added twice."""
        event = {"event": "table", "name": name, "rows": plain(rows)}
        earlier = ({key: old.get(key) for key in event} for old, _ in read_lines(self._folder / EVENTS))
        if event not in earlier:
            self._events.append(event)

    def dataset(self, name: str, path: str, digest: str, role: str) -> None:
        self._event("dataset", name=name, path=path, digest=digest, role=role)

    def artifact(self, path: Path) -> None:
        self._event("artifact", path=path.absolute())

    def model(self, model: Mapping[str, Any]) -> None:
        self._events.append({"event": "model", **without_secrets(plain(model))})

    def close(self, status: Status = "FINISHED", reason: str = "") -> None:
        """Records how the run ended and gives the upload some seconds to catch up. A second call changes nothing."""
        if self._is_open:
            self._is_open = False
            self._event("status", status=status, reason=reason)
            self._metrics.close()
            self._events.close()
            if self._sync:
                self._sync.close()

    def _event(self, kind: str, **fields: Any) -> None:
        self._events.append({"event": kind, **without_secrets(fields)})

    def _record_code(self) -> None:
        revision = code_revision()
        self.tags({"git.revision": revision, "mlflow.source.git.commit": revision.removesuffix("+changes")})
        if diff := code_diff():
            write_atomic(self._folder / "git.diff", without_secrets(diff))
            self.artifact(self._folder / "git.diff")

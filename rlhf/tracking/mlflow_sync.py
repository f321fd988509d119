"""Uploads a folder's JSONL files to an MLflow run: within seconds, or later if MLflow was down or slow."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlhf.config import TrackingConfig, without_secrets
from rlhf.runs.artifacts import write_json
from rlhf.tracking.jsonl import read_lines
from rlhf.tracking.mlflow_client import Client, is_outage, locked, public_uri

METRICS, EVENTS, STATE = "metrics.jsonl", "events.jsonl", "mlflow.json"
POLL_S, LONGEST_PAUSE_S, CLOSE_LIMIT_S, RETRY_S = 2.0, 60.0, 20.0, 1.0
MAX_TRIES = 3
NOTHING = -1  # the step before all steps
LINES_PER_CALL = 50  # about 1,000 metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncState:
    """mlflow.json: the MLflow run of a folder, and how many bytes of each file it has."""

    run_name: str
    parent_run_id: str | None  # None: no parent. "": looked up in the folders above
    tracking_uri: str = ""
    experiment: str = ""
    run_id: str | None = None
    metrics_bytes: int = 0
    events_bytes: int = 0
    sent: dict[str, int] = field(default_factory=dict)  # metric that was rewound -> its last step in MLflow

    @staticmethod
    def open(folder: Path, run_name: str, parent_run_id: str | None) -> None:
        """Creates or keeps the state of a folder whose run starts or resumes."""
        state = SyncState.load(folder) if (folder / STATE).exists() else SyncState(run_name, parent_run_id)
        replace(state, run_name=run_name, parent_run_id=parent_run_id).save(folder)

    @staticmethod
    def load(folder: Path) -> SyncState:
        return SyncState(**json.loads((folder / STATE).read_text()))

    def save(self, folder: Path) -> None:
        write_json(folder / STATE, asdict(self), durable=False)

    def is_in(self, settings: TrackingConfig) -> bool:
        """Whether it has a run in the store and experiment of `settings`."""
        here = (public_uri(settings.uri or ""), settings.experiment)
        return self.run_id is not None and (self.tracking_uri, self.experiment) == here

    def is_complete(self, folder: Path) -> bool:
        return self.metrics_bytes >= _size(folder / METRICS) and self.events_bytes >= _size(folder / EVENTS)


def rewind(folder: Path, step: int) -> None:
    """Drops the metrics after `step`, which a resumed stage makes again. MLflow cannot delete any, so none is sent twice.

    Waits while an upload runs. If it is interrupted between its two writes, it can be repeated.
    """
    with locked(folder):
        state, lines = SyncState.load(folder), list(read_lines(folder / METRICS))
        kept = list(takewhile(lambda entry: entry[0]["step"] <= step, lines))
        size, sent = kept[-1][1] if kept else 0, dict(state.sent)
        for line, end in lines[len(kept) :]:
            if end <= state.metrics_bytes:
                sent |= {
                    name: max(line["step"], sent.get(name, line["step"])) for name in line.keys() - {"step", "time"}
                }
        replace(state, metrics_bytes=min(state.metrics_bytes, size), sent=sent).save(folder)
        if (folder / METRICS).exists():
            os.truncate(folder / METRICS, size)


def fill_in(folder: Path, settings: TrackingConfig) -> bool:
    """Uploads what MLflow missed of the runs in `folder` and below, parents first. False, and a warning, if some is left.

    Only for runs that no process writes to any more.
    """
    folders = {path.parent for path in folder.rglob(STATE)}
    return _fill_in(sorted(folders, key=lambda one: _place(one, folders)), settings)


def _place(folder: Path, folders: Collection[Path]) -> tuple[int, float]:
    """Parents first, then in the order in which they started, so that what a stage started from is registered already."""
    first = next((event["time"] for event, _ in read_lines(folder / EVENTS)), math.inf)
    return sum(parent in folders for parent in folder.parents), first


def _fill_in(folders: Iterable[Path], settings: TrackingConfig) -> bool:
    for folder in folders if settings.uri is not None else ():
        if failure := _try_to_upload(MLflowUploader(folder, settings)):
            _warn(folder, settings, failure)
            return False
    return True


def catch_up(folder: Path, settings: TrackingConfig) -> None:
    """`fill_in`, for which nobody waits longer than `CLOSE_LIMIT_S`."""
    thread = threading.Thread(target=fill_in, args=(folder, settings), daemon=True)
    thread.start()
    thread.join(CLOSE_LIMIT_S)


def fill_in_behind(folders: Iterable[Path], settings: TrackingConfig) -> None:
    """Uploads what MLflow missed of these runs, without those below them, in the background."""
    threading.Thread(target=_fill_in, args=(sorted(folders), settings), daemon=True).start()


class SyncThread(threading.Thread):
    """Uploads every few seconds, and less often while MLflow is down."""

    def __init__(self, folder: Path, settings: TrackingConfig, watch_system: bool) -> None:
        super().__init__(name=f"mlflow of {folder.name}", daemon=True)
        self._folder, self._settings, self._watch_system = folder, settings, watch_system
        self._uploader = MLflowUploader(folder, settings)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self.start()

    def run(self) -> None:
        pause, monitor = 0.0, None
        while not self._closing.wait(pause):
            self._failure = _try_to_upload(self._uploader, tries=1)
            pause = min(pause + POLL_S, LONGEST_PAUSE_S) if self._failure else POLL_S
            if self._watch_system and not monitor and not self._failure:
                monitor = self._uploader.watch_system()
        if monitor:
            monitor.finish()
        self._failure = _try_to_upload(self._uploader)

    def close(self) -> None:
        """Waits until everything is uploaded, at most `CLOSE_LIMIT_S`; warns if something is left."""
        self._closing.set()
        self.join(CLOSE_LIMIT_S)
        if self.is_alive():
            self._failure = TimeoutError(f"not done within {CLOSE_LIMIT_S:.0f} s")
        if self._failure:
            _warn(self._folder, self._settings, self._failure)


class MLflowUploader:
    """Uploads the lines of one folder that its MLflow run does not have yet."""

    def __init__(self, folder: Path, settings: TrackingConfig) -> None:
        self._folder, self._settings = folder, settings
        self._refusals: Counter[tuple[str, int]] = Counter()  # by place in a file

    def upload(self) -> None:
        """Uploads everything new. Raises what MLflow raises; what was sent until then stays recorded."""
        with locked(self._folder, wait=False):
            self._state = SyncState.load(self._folder)
            if self._state.is_in(self._settings) and self._state.is_complete(self._folder):
                return
            self._client = Client(self._settings)
            self._record(self._with_run(self._state))
            self._upload_events()
            self._upload_metrics()

    def watch_system(self) -> Any:
        """Starts a monitor of CPU, memory, disk, network and GPUs; its `finish()` ends it."""
        return self._client.watch_system(self._state.run_id or "")

    def _with_run(self, state: SyncState) -> SyncState:
        """`state` with an MLflow run that exists: its own, or a new and empty one."""
        if state.is_in(self._settings) and self._client.has_run(state.run_id or ""):
            return state
        started = next((event["time"] for event, _ in read_lines(self._folder / EVENTS)), time.time())
        return SyncState(
            run_name=state.run_name,
            parent_run_id=state.parent_run_id,
            tracking_uri=public_uri(self._settings.uri or ""),
            experiment=self._settings.experiment,
            run_id=self._client.create_run(state.run_name, self._parent_run_id(state), started),
        )

    def _parent_run_id(self, state: SyncState) -> str | None:
        """From the folders above: MLflow may have been down, or another store in use, when the id was given."""
        if state.parent_run_id is None:
            return None
        for folder in self._folder.absolute().parents:
            if (folder / STATE).exists():
                parent = SyncState.load(folder)
                if parent.is_in(self._settings):
                    return parent.run_id
                raise RuntimeError(f"the run of {folder} is not in MLflow yet")
        return state.parent_run_id or None

    def _upload_events(self) -> None:
        for event, end in read_lines(self._folder / EVENTS, self._state.events_bytes):
            if event["event"] == "status":  # metrics come before the end of the run
                self._upload_metrics()
            self._send(self._client.send_event, event, event["event"], events_bytes=end)

    def _upload_metrics(self) -> None:
        new = list(read_lines(self._folder / METRICS, self._state.metrics_bytes))
        for start in range(0, len(new), LINES_PER_CALL):
            lines, ends = zip(*new[start : start + LINES_PER_CALL], strict=True)
            self._send(self._client.send_metrics, [*map(self._unsent, lines)], "metrics", metrics_bytes=ends[-1])

    def _unsent(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line without the metrics that MLflow already had before they were rewound."""
        sent, step = self._state.sent, line["step"]
        return {
            name: value for name, value in line.items() if name in ("step", "time") or step > sent.get(name, NOTHING)
        }

    def _send(self, send: Callable[[str, Any], None], content: Any, what: str, **cursor: int) -> None:
        """Sends and records the position. What MLflow refuses `MAX_TRIES` times is skipped, so it does not block the rest;
        what it could not take just now never is."""
        try:
            send(self._state.run_id or "", content)
        except Exception as error:
            if is_outage(error):
                raise
            place = next(iter(cursor.items()))
            self._refusals[place] += 1
            if self._refusals[place] < MAX_TRIES:
                raise
            log.warning("MLflow did not take %s of %s, left out: %s", what, self._folder, _first_line(error))
        self._record(replace(self._state, **cursor))

    def _record(self, state: SyncState) -> None:
        self._state = state
        state.save(self._folder)


def _try_to_upload(uploader: MLflowUploader, tries: int = MAX_TRIES) -> Exception | None:
    failure = None
    for attempt in range(tries):
        time.sleep(RETRY_S if attempt else 0)
        try:
            uploader.upload()
        except Exception as error:  # noqa: BLE001 - whatever MLflow raises, training goes on
            failure = error
        else:
            return None
    return failure


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _warn(folder: Path, settings: TrackingConfig, failure: Exception) -> None:
    text = "MLflow at %s does not have all of %s yet (%s). The files there do; the next run sends the rest."
    log.warning(text, public_uri(settings.uri or ""), folder, _first_line(failure))


def _first_line(error: Exception) -> str:
    return without_secrets((str(error) or type(error).__name__).splitlines()[0])[:200]

"""Keeps an MLflow run equal to a folder's JSONL files: soon while all is well, later where MLflow was down or slow."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from rlhf.config import TrackingConfig, without_secrets
from rlhf.runs.artifacts import write_json
from rlhf.tracking.jsonl import read_lines
from rlhf.tracking.mlflow_client import Client, locked, public_uri

METRICS, EVENTS, MIRROR = "metrics.jsonl", "events.jsonl", "mlflow.json"
POLL_S, LONGEST_PAUSE_S, CLOSE_LIMIT_S, RETRY_S = 2.0, 60.0, 20.0, 1.0
MAX_TRIES = 3
NOTHING = -1  # the step before all steps
LINES_PER_CALL = 50  # about 1,000 metrics

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SyncState:
    """mlflow.json: the MLflow run that mirrors a folder, and how many bytes of each file it has."""

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
        """Make or keep the mirror of a folder whose run begins or goes on."""
        mirror = SyncState.load(folder) if (folder / MIRROR).exists() else SyncState(run_name, parent_run_id)
        replace(mirror, run_name=run_name, parent_run_id=parent_run_id).save(folder)

    @staticmethod
    def load(folder: Path) -> SyncState:
        return SyncState(**json.loads((folder / MIRROR).read_text()))

    def save(self, folder: Path) -> None:
        write_json(folder / MIRROR, asdict(self), durable=False)

    def is_in(self, settings: TrackingConfig) -> bool:
        """Whether it has a run in the store and experiment of `settings`."""
        here = (public_uri(settings.uri or ""), settings.experiment)
        return self.run_id is not None and (self.tracking_uri, self.experiment) == here

    def is_whole(self, folder: Path) -> bool:
        return self.metrics_bytes >= _size(folder / METRICS) and self.events_bytes >= _size(folder / EVENTS)


def rewind(folder: Path, step: int) -> None:
    """Drops the metrics after `step`, which a resumed stage makes again. MLflow forgets none, so it gets none twice.

    Waits while something is being sent. Broken off between its two writes, it can be done again.
    """
    with locked(folder):
        mirror, lines = SyncState.load(folder), list(read_lines(folder / METRICS))
        kept = list(takewhile(lambda entry: entry[0]["step"] <= step, lines))
        size, sent = kept[-1][1] if kept else 0, dict(mirror.sent)
        for line, end in lines[len(kept) :]:
            if end <= mirror.metrics_bytes:
                sent |= {
                    name: max(line["step"], sent.get(name, line["step"])) for name in line.keys() - {"step", "time"}
                }
        replace(mirror, metrics_bytes=min(mirror.metrics_bytes, size), sent=sent).save(folder)
        if (folder / METRICS).exists():
            os.truncate(folder / METRICS, size)


def fill_in(folder: Path, settings: TrackingConfig) -> bool:
    """Send what MLflow missed of the runs in `folder` and below, parents first. False, and a warning, if it is not all.

    Only for runs that no process is still writing.
    """
    if settings.uri is None:
        return True
    for path in sorted(folder.rglob(MIRROR), key=lambda path: len(path.parts)):
        if failure := _try_to_ship(MLflowUploader(path.parent, settings)):
            _warn(path.parent, settings, failure)
            return False
    return True


class SyncThread(threading.Thread):
    """Ships every few seconds, and more and more seldom while MLflow is down."""

    def __init__(self, folder: Path, settings: TrackingConfig, watch_system: bool) -> None:
        super().__init__(name=f"mlflow of {folder.name}", daemon=True)
        self._folder, self._settings, self._watch_system = folder, settings, watch_system
        self._shipper = MLflowUploader(folder, settings)
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self.start()

    def run(self) -> None:
        pause, monitor = 0.0, None
        while not self._closing.wait(pause):
            self._failure = _try_to_ship(self._shipper, tries=1)
            pause = min(pause + POLL_S, LONGEST_PAUSE_S) if self._failure else POLL_S
            if self._watch_system and not monitor and not self._failure:
                monitor = self._shipper.watch_system()
        if monitor:
            monitor.finish()
        self._failure = _try_to_ship(self._shipper)

    def close(self) -> None:
        """Wait until all is sent, `CLOSE_LIMIT_S` at most; a warning says what is left."""
        self._closing.set()
        self.join(CLOSE_LIMIT_S)
        if self.is_alive():
            self._failure = TimeoutError(f"not done within {CLOSE_LIMIT_S:.0f} s")
        if self._failure:
            _warn(self._folder, self._settings, self._failure)


class MLflowUploader:
    """Sends the lines of one folder that its MLflow run does not have yet."""

    def __init__(self, folder: Path, settings: TrackingConfig) -> None:
        self._folder, self._settings = folder, settings
        self._refusals: Counter[tuple[str, int]] = Counter()  # by place in a file

    def ship(self) -> None:
        """One pass over everything new. Raises what MLflow raises; what was sent until then stays noted."""
        with locked(self._folder, wait=False):
            self._mirror = SyncState.load(self._folder)
            if self._mirror.is_in(self._settings) and self._mirror.is_whole(self._folder):
                return
            self._client = Client(self._settings)
            self._note(self._with_run(self._mirror))
            self._ship_events()
            self._ship_metrics()

    def watch_system(self) -> Any:
        """A started monitor of processors, memory, disk, network and GPUs; its `finish()` ends it."""
        return self._client.watch_system(self._mirror.run_id or "")

    def _with_run(self, mirror: SyncState) -> SyncState:
        """`mirror` with an MLflow run that exists: its own, or a new one that has nothing yet."""
        if mirror.is_in(self._settings) and self._client.has_run(mirror.run_id or ""):
            return mirror
        started = next((event["time"] for event, _ in read_lines(self._folder / EVENTS)), time.time())
        return SyncState(
            run_name=mirror.run_name,
            parent_run_id=mirror.parent_run_id,
            tracking_uri=public_uri(self._settings.uri or ""),
            experiment=self._settings.experiment,
            run_id=self._client.create_run(mirror.run_name, self._parent_run_id(mirror), started),
        )

    def _parent_run_id(self, mirror: SyncState) -> str | None:
        """The folders above know best: MLflow may have been down, or another one, when the id was given."""
        if mirror.parent_run_id is None:
            return None
        for folder in self._folder.absolute().parents:
            if (folder / MIRROR).exists():
                parent = SyncState.load(folder)
                if parent.is_in(self._settings):
                    return parent.run_id
                raise RuntimeError(f"the run of {folder} is not in MLflow yet")
        return mirror.parent_run_id or None

    def _ship_events(self) -> None:
        for event, end in read_lines(self._folder / EVENTS, self._mirror.events_bytes):
            if event["event"] == "status":  # the last word comes last
                self._ship_metrics()
            self._send(self._client.send_event, event, event["event"], events_bytes=end)

    def _ship_metrics(self) -> None:
        new = list(read_lines(self._folder / METRICS, self._mirror.metrics_bytes))
        for start in range(0, len(new), LINES_PER_CALL):
            lines, ends = zip(*new[start : start + LINES_PER_CALL], strict=True)
            self._send(self._client.send_metrics, [*map(self._unsent, lines)], "metrics", metrics_bytes=ends[-1])

    def _unsent(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line without the metrics that MLflow had of its step before they were rewound."""
        sent, step = self._mirror.sent, line["step"]
        return {
            name: value for name, value in line.items() if name in ("step", "time") or step > sent.get(name, NOTHING)
        }

    def _send(self, send: Callable[[str, Any], None], content: Any, what: str, **cursor: int) -> None:
        """Send and note the place. What MLflow refuses again and again, although it answers, holds up nothing else."""
        try:
            send(self._mirror.run_id or "", content)
        except Exception as error:
            place = next(iter(cursor.items()))
            self._refusals[place] += 1
            if self._refusals[place] < MAX_TRIES:
                raise
            log.warning("MLflow did not take %s of %s, left out: %s", what, self._folder, _first_line(error))
        self._note(replace(self._mirror, **cursor))

    def _note(self, mirror: SyncState) -> None:
        self._mirror = mirror
        mirror.save(self._folder)


def _try_to_ship(shipper: MLflowUploader, tries: int = MAX_TRIES) -> Exception | None:
    failure = None
    for attempt in range(tries):
        time.sleep(RETRY_S if attempt else 0)
        try:
            shipper.ship()
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

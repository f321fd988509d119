"""Runs whose process ended without a word, as after `kill -9`: the next command closes them.

A tracker holds a lock on its events.jsonl, which the system releases however the process ends.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from rlhf.config import TrackingConfig
from rlhf.tracking.base import mark_ended
from rlhf.tracking.jsonl import is_free
from rlhf.tracking.mlflow_sync import EVENTS, fill_in_behind

REASON = "the process ended without a word: kill -9, no memory, or the machine went down"
TAIL_BYTES = 1 << 16
DEEPEST = 4  # runs/<sweep>/<cell>/reward/<name>/events.jsonl


def close_abandoned(runs_dir: Path, settings: TrackingConfig) -> None:
    """Ends every run below `runs_dir` that is open and has no process: in the files at once, in MLflow in the background."""
    paths = [path for depth in range(1, DEEPEST + 1) for path in runs_dir.glob("*/" * depth + EVENTS)]
    closed = [
        path.parent for path in sorted(paths) if _is_abandoned(path) and mark_ended(path.parent, "KILLED", REASON)
    ]
    fill_in_behind(closed, settings)


def _is_abandoned(path: Path) -> bool:
    return not _has_ended(path) and is_free(path)


def _has_ended(path: Path) -> bool:
    """Whether the last line says how the run ended. A tracker writes nothing after that."""
    with path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL_BYTES))
        last = stream.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        event = json.loads(last)
    except ValueError:  # half a line, or the end of a long one
        return False
    return event["event"] == "status" and event["status"] != "RUNNING"

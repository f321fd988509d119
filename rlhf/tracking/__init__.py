"""Run history: JSONL files in the run's folder, which a background thread uploads to MLflow.

base.py           what stages and the driver call; writes metrics.jsonl and events.jsonl
abandoned.py      closes runs whose process is gone
jsonl.py          JSONL files that survive a killed writer
mlflow_sync.py    what MLflow already has of a folder (mlflow.json), the thread that uploads the rest, `fill_in`
registry.py       registers artifacts as model versions; versions.py finds them, and keeps which one is the champion
mlflow_client.py  the calls of MLflow that record a run
mlflow_runs.py    reads runs back from MLflow
recorded.py       reads runs back from their files
reach.py          whether the store can be reached
"""

from rlhf.tracking.abandoned import close_abandoned
from rlhf.tracking.base import (
    NullTracker,
    Tracker,
    keep_earlier,
    mark_ended,
    open_parent,
    open_tracker,
    read_lines_of,
    read_metrics,
    status_of,
)
from rlhf.tracking.mlflow_client import absolute_uri, public_uri
from rlhf.tracking.mlflow_runs import recorded_runs
from rlhf.tracking.mlflow_sync import EVENTS, METRICS, NOTHING, catch_up, fill_in
from rlhf.tracking.reach import why_unreachable
from rlhf.tracking.versions import Registry, Version, is_reference

__all__ = [
    "EVENTS",
    "METRICS",
    "NOTHING",
    "NullTracker",
    "Registry",
    "Tracker",
    "Version",
    "absolute_uri",
    "catch_up",
    "close_abandoned",
    "fill_in",
    "is_reference",
    "keep_earlier",
    "mark_ended",
    "open_parent",
    "open_tracker",
    "public_uri",
    "read_lines_of",
    "read_metrics",
    "recorded_runs",
    "status_of",
    "why_unreachable",
]

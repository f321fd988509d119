"""Run history. JSONL files in a run's own folder are the truth; a thread mirrors them in MLflow as well as it can.

tracker.py  what stages and the driver call; writes metrics.jsonl and events.jsonl
lines.py    JSONL files that survive a killed writer
mirror.py   what MLflow has of a folder (mlflow.json), the thread that sends the rest, and `fill_in`
client.py   the only file that speaks MLflow
"""

from rlhf.tracking.base import NullTracker, Tracker, mark_failed, open_parent, open_tracker, read_metrics
from rlhf.tracking.mlflow_client import absolute_uri, public_uri
from rlhf.tracking.mlflow_sync import NOTHING, fill_in

__all__ = [
    "NOTHING",
    "NullTracker",
    "Tracker",
    "absolute_uri",
    "fill_in",
    "mark_failed",
    "open_parent",
    "open_tracker",
    "public_uri",
    "read_metrics",
]

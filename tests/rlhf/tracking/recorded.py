"""What the tests of this folder record, and where."""

from pathlib import Path

from rlhf import tracking
from rlhf.config import TrackingConfig
from rlhf.tracking import open_tracker

NOBODY_LISTENS = TrackingConfig(uri="http://127.0.0.1:9")
FILES_ONLY = TrackingConfig(uri=None)
ROOT = Path(tracking.__file__).parents[2]


def finished(folder: Path, settings: TrackingConfig, **calls) -> str:
    """The run id of a run on which the given methods were called."""
    tracker = open_tracker(folder, settings, "stage", None, is_writer=True)
    for method, arguments in calls.items():
        getattr(tracker, method)(*arguments)
    tracker.close()
    return tracker.run_id or ""


def file_of_run(store_client, run_id, name) -> str:
    return Path(store_client.download_artifacts(run_id, name)).read_text()

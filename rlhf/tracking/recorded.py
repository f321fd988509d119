"""What a finished or stopped run has recorded in the files of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.tracking.base import read_metrics
from rlhf.tracking.jsonl import read_lines
from rlhf.tracking.mlflow_client import flatten
from rlhf.tracking.mlflow_sync import EVENTS

DEEPEST = 2  # reward/<name>/events.jsonl, below the run's folder


def is_run(folder: Path) -> bool:
    return (folder / EVENTS).is_file() and bool(params_in(folder))


def parts_in(folder: Path) -> list[str]:
    """The parts that have recorded something, `reward/safety` for instance."""
    paths = [path for depth in range(1, DEEPEST + 1) for path in folder.glob("*/" * depth + EVENTS)]
    parts = [path.parent.relative_to(folder).as_posix() for path in paths]
    return sorted(part for part in parts if not part.startswith("earlier"))


def params_in(folder: Path) -> dict[str, str]:
    """Dotted name → value, as MLflow has them."""
    params: dict[str, str] = {}
    for event, _ in read_lines(folder / EVENTS):
        if event["event"] == "params":
            params |= dict(flatten(event["values"]))
    return params


def data_in(folder: Path) -> dict[str, str]:
    """`role: name` → digest of every data set of the run."""
    events = (event for event, _ in read_lines(folder / EVENTS) if event["event"] == "dataset")
    return {f"{event['role']}: {event['name']}": event["digest"] for event in events}


def metrics_in(folder: Path, names: Sequence[str]) -> Mapping[str, list[tuple[int, float]]]:
    return {name: points for name, points in read_metrics(folder).items() if name in names}

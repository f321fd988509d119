"""The run of a sweep in MLflow: what its cells have in common, the grid, and in the end the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import parent_run
from launch.sweep.grid import Plan
from rlhf.runs.artifacts import digest_of
from rlhf.tracking import Tracker, open_parent


def begin(plan: Plan) -> Tracker:
    """More values of the same settings go on in the same run: they are tags, because parameters cannot change."""
    settings = parent_run.settings_of(plan.whole)
    for name in plan.grid:
        _remove(settings, name)
    whole = plan.whole
    tracker = open_parent(whole.folder, whole.tracking, whole.name, digest_of([settings, sorted(plan.grid)]))
    tracker.params(settings)
    tracker.tags({f"sweep.{name}": ", ".join(values) for name, values in plan.grid.items()})
    return tracker


def finish(tracker: Tracker, description: str, files: Sequence[Path], failure: str) -> None:
    tracker.tags({parent_run.DESCRIPTION: parent_run.described(description)})
    for path in files:
        tracker.artifact(path)
    tracker.close("FAILED" if failure else "FINISHED", failure)


def _remove(settings: dict[str, Any], dotted: str) -> None:
    section, _, rest = dotted.partition(".")
    if rest and isinstance(settings.get(section), dict):
        _remove(settings[section], rest)
    else:
        settings.pop(section, None)

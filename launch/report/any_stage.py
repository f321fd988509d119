"""A stage without a section of its own in the report: the estimates and numbers of its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from launch.report.section import Metrics, Section, Table, interval, number
from rlhf.tracking import read_lines_of, read_metrics


def section(stage: str) -> Section:
    return Section(
        partial(_gather, stage),
        tables=partial(_tables, stage),
        facts=partial(_facts, stage),
        headline=partial(_headline, stage),
        curves=partial(_curves, stage),
        results=partial(_results, stage),
    )


def _gather(stage: str, folder: Path, metrics: Metrics) -> dict[str, Any]:
    """The stage's metrics; by part where there are several."""
    own = {part.removeprefix(stage).removeprefix("/"): of_part for part, of_part in metrics.items()}
    return dict(own[""]) if "" in own else own


def _tables(stage: str, found: Mapping[str, Any]) -> list[Table]:
    rows = [(name, interval(value)) for name, value in _leaves(found) if isinstance(value, Mapping)]
    return [Table(f"{stage.upper()}: held-out metrics", ("figure", "value"), rows)] if rows else []


def _facts(stage: str, found: Mapping[str, Any]) -> list[str]:
    numbers = [f"{name} {number(value)}" for name, value in _leaves(found) if isinstance(value, int | float)]
    return [f"{stage.upper()}: {', '.join(numbers)}"] if numbers else []


def _headline(stage: str, found: Mapping[str, Any]) -> dict[str, float]:
    """eval/<stage>/… of the estimates that stand on top."""
    tops = {name: value for name, value in found.items() if isinstance(value, Mapping) and "value" in value}
    return {f"eval/{stage}/{name}": value["value"] for name, value in tops.items() if value["value"] is not None}


def _curves(stage: str, folder: Path) -> list[dict[str, float]]:
    """Every metric that stands under the stage's name; none of a stage of several parts, which would share one name."""
    names = [name for name in read_metrics(folder / stage) if name.startswith(f"{stage}/")]
    return read_lines_of(folder / stage, names)


def _results(stage: str, found: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """The estimates that stand on top, and its loss."""
    tops = {name: value for name, value in found.items() if isinstance(value, Mapping) and "value" in value}
    loss = {"loss": {"value": found["loss"]}} if isinstance(found.get("loss"), float) else {}
    return {(stage, name): value for name, value in (tops | loss).items() if value["value"] is not None}


def _leaves(found: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Estimates and numbers by their dotted names; lists are for report.json alone."""
    for name, value in found.items():
        if isinstance(value, Mapping) and "value" not in value:
            yield from _leaves(value, f"{prefix}{name}.")
        elif isinstance(value, Mapping | int | float):
            yield f"{prefix}{name}", value

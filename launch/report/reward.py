"""Reward models in the report: how well each ranks held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from launch import plots
from launch.report.section import Metrics, Section, Table, interval


def _gather(folder: Path, metrics: Metrics) -> dict[str, Any]:
    return {part.removeprefix("reward/"): own for part, own in metrics.items()}


def _drawings(found: Mapping[str, Any]) -> dict[str, tuple[str, Callable[[], bytes]]]:
    title = "Reward models: held-out accuracy by rating, calibration"
    return {"reward_accuracy": (title, lambda: plots.reward_accuracy(found))}


def _tables(found: Mapping[str, Any]) -> list[Table]:
    groups = dict.fromkeys(["all", *(rating for model in found.values() for rating in model["by_rating"])])
    rows = [(group, *(interval(_accuracy(model, group)) for model in found.values())) for group in groups]
    return [Table("Reward models: accuracy on held-out pairs", ("pairs", *found), rows)]


def _accuracy(model: Mapping[str, Any], group: str) -> Mapping[str, Any] | None:
    return model["accuracy"] if group == "all" else model["by_rating"].get(group)


def _headline(found: Mapping[str, Any]) -> dict[str, float]:
    return {f"eval/accuracy_{name}": model["accuracy"]["value"] for name, model in found.items()}


def _results(found: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(f"reward/{name}", "accuracy"): model["accuracy"] for name, model in found.items()}


SECTION = Section(_gather, tables=_tables, headline=_headline, results=_results, drawings=_drawings)

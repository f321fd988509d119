"""What every evaluation leaves behind: files, a run in MLflow, tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.evaluate.metrics import flat
from launch.evaluate.page import Page, html, markdown
from launch.report import rich_table
from launch.report.section import Table
from rlhf.config import TrackingConfig
from rlhf.errors import UserError
from rlhf.runs.artifacts import write_atomic, write_json
from rlhf.tracking import open_tracker


def check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; name a folder")


def write(out: Path, report: Mapping[str, Any], page: Page) -> None:
    """report.json, report.md and report.html."""
    write_json(out / "report.json", report)
    write_atomic(out / "report.md", markdown(page))
    write_atomic(out / "report.html", html(page))


def track(out: Path, models: Mapping[str, str], metrics: Mapping[str, float], uri: str | None) -> None:
    """A run in MLflow, named like the folder, with the metrics and the written report."""
    tracker = open_tracker(out / "tracking", TrackingConfig(uri=uri), out.name, None, is_writer=True)
    tracker.params({"models": dict(models)})
    tracker.metrics(metrics, 0)
    tracker.artifact(out / "report.md")
    tracker.artifact(out / "report.html")
    tracker.close()


def with_names(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The values of reports for MLflow: of one part by their keys, of several with its name before them."""
    return {
        f"{name}/{key}" if len(parts) > 1 else key: value
        for name, found in parts.items()
        for key, value in flat(found).items()
    }


def show(out: Path, tables: Iterable[Table], warnings: Iterable[str], more: str) -> None:
    """Warnings, tables and where the report is; `more` says which other files are there."""
    console = Console()
    for text in warnings:
        print(f"warning: {text}", file=sys.stderr)
    for table in tables:
        console.print(rich_table(table))
    console.print(f"report: {out / 'report.html'}, report.md, report.json; {more}")

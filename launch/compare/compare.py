"""`rlhf compare`: runs side by side, from their folders or from MLflow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from launch.compare.plots import plots
from launch.compare.record import from_folders, from_mlflow
from launch.compare.results import compare
from launch.compare.tables import tables
from launch.evaluate.output import check_folder
from launch.evaluate.page import Page, html
from launch.report import rich_table
from launch.report.section import Table
from rlhf.errors import UserError
from rlhf.runs.artifacts import write_atomic, write_json

STAR = "* the 95 % interval of the difference leaves out 0"
NOTE = "Brackets and bars: 95 % intervals, over prompts (clustered) or over seeds (Student's t)."


def compare_runs(names: Sequence[str], tracking: str | None, experiment: str, out: Path | None) -> dict[str, Any]:
    """Compares the runs, shows the tables, and writes report.json and compare.html into `out`. Returns the report."""
    if len(names) < 2:
        raise UserError("rlhf compare needs two runs at least: rlhf compare RUN RUN …")
    if out is not None:
        check_folder(out)
    runs = from_mlflow(tracking, experiment, names) if tracking else from_folders([Path(name) for name in names])
    report = compare(runs)
    show(report, Console())
    if out is not None:
        write(report, out)
        print(f"report: {out / 'compare.html'}, report.json")
    return report


def write(report: Mapping[str, Any], out: Path, before: Sequence[Table] = ()) -> list[Path]:
    """`before`: tables that come first on the page. Returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    write_atomic(out / "compare.html", html(page(report, before)))
    return [out / "report.json", out / "compare.html"]


def show(report: Mapping[str, Any], console: Console) -> None:
    for table in tables(report):
        console.print(rich_table(table))
    if any(report["differences"].values()) or report["seeds"]:
        console.print(Text(STAR))
    for line in notes(report):
        console.print(Text(line))
    for line in warnings(report):
        console.print(Text(f"warning: {line}", style="yellow"))


def page(report: Mapping[str, Any], before: Sequence[Table] = ()) -> Page:
    return Page(
        title=f"Comparison of {', '.join(run['name'] for run in report['runs'])}",
        notes=[*(f"{run['name']}: {run['place']}" for run in report["runs"]), *notes(report), STAR],
        warnings=list(warnings(report)),
        tables=[*before, *tables(report)],
        plots=plots(report),
        examples=[],
        examples_title="",
        intervals=NOTE,
    )


def notes(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["settings"] and not report["data"]:
        yield "settings and data are the same in all runs"
    if data := report["data"]:
        yield f"data differ: {', '.join(data)}"


def warnings(report: Mapping[str, Any]) -> Iterator[str]:
    for run in report["runs"]:
        if not run["finished"]:
            yield f"{run['name']} has no report: it has not finished"
        elif not run["by_prompt"]:
            yield f"{run['name']} has kept no values by prompt, so it is not paired: an earlier version made it"
    by_prompt = {run["name"] for run in report["runs"] if run["by_prompt"]}
    for run, reasons in report["not_paired"].items():
        for part, reason in reasons.items() if by_prompt >= {run, report["baseline"]} else ():
            yield f"{run} is not paired with {report['baseline']} in {part}: {reason}"

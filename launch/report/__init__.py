"""The closing report of a run: report.json for programs, report.md and plots for people, a table for the terminal.

A section per stage of the pipeline. All figures come from the manifests and metrics of the stages; docs/metrics.md
defines them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.report import any_stage, ppo, reward, sft
from launch.report.section import Section, Table
from rlhf.config import RunConfig
from rlhf.runs.artifacts import load, write_atomic, write_json
from stages.base import STAGES

if TYPE_CHECKING:
    from rich.console import RenderableType

LONGEST_NAME = 32  # of a row in the terminal, that is not broken: what stands beside it is, where there is no room
SECTIONS = {"sft": sft.SECTION, "reward": reward.SECTION, "ppo": ppo.SECTION}


def build(folder: Path, config: RunConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, report.md and plots/*.png into the run's folder and return the report.

    `extra`: {"seconds": {stage: s}, "artifacts": {stage: path}, "mlflow": {"tracking_uri": …, "run_id": …}}.
    Raises UserError(4) when a stage is not complete.
    """
    report: dict[str, Any] = {"run": config.name}
    appendix: list[str] = []
    for name in config.pipeline:
        metrics = {part: load(folder / part / "artifact").metrics for part in STAGES[name].parts_of(config)}
        report[name] = section_of(name).gather(folder, metrics)
        appendix += section_of(name).appendix(metrics)
    report |= extra
    (folder / "plots").mkdir(exist_ok=True)
    titles = {}
    for section, found in _sections(report):
        for name, (title, draw) in section.drawings(found).items():
            titles[name] = title
            write_atomic(folder / "plots" / f"{name}.png", draw())
    write_atomic(folder / "report.md", markdown(report, titles, appendix))
    write_json(folder / "report.json", report)
    return report


def section_of(stage: str) -> Section:
    return SECTIONS.get(stage) or any_stage.section(stage)


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures by which runs are compared, named for the parent run in MLflow: eval/<policy>/…, eval/accuracy_…."""
    return {name: value for section, found in _sections(report) for name, value in section.headline(found).items()}


def results(report: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(part, metric) → estimate, or `{"value": …}` alone, of what each stage has made."""
    return {key: value for section, found in _sections(report) for key, value in section.results(found).items()}


def curves(folder: Path, report: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """The metrics by which the training of runs is compared, a line a step, for the parent run in MLflow."""
    return [line for section, _ in _sections(report) for line in section.curves(folder)]


def render(report: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows at the end of a run."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [rich_table(table) for table in tables(report)]
    warnings = (Text(f"warning: {line}", style="yellow") for line in _warnings(report))
    return Group(*warnings, *parts, *(Text(line) for line in _facts(report)))


def rich_table(table: Table) -> RenderableType:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    names_fit = all(len(row[0]) <= LONGEST_NAME for row in table.rows)
    for number, column in enumerate(table.columns):
        name = number == 0
        shown.add_column(column, justify="left" if name else "right", overflow="fold", no_wrap=name and names_fit)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def markdown(report: Mapping[str, Any], plots: Mapping[str, str], appendix: Sequence[str]) -> str:
    """`plots`: the titles by name."""
    lines = [
        f"# Report of `{report['run']}`",
        "",
        "Definitions and units: `docs/metrics.md`. Brackets: 95 % intervals.",
        *(f"\n> **Warning.** {line}" for line in _warnings(report)),
    ]
    for table in tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (table.columns, ("---",) * len(table.columns), *table.rows)]
    lines += ["", *(f"- {line}" for line in _facts(report)), *(["", "## Plots"] if plots else [])]
    for name, title in plots.items():
        lines += ["", f"![{title}](plots/{name}.png)"]
    return "\n".join([*lines, *appendix]) + "\n"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report's figures as text, for the terminal and for report.md."""
    stages = Table(
        "Stages",
        ("stage", "seconds", "artifact"),
        [
            (stage, f"{report['seconds'][stage]:.0f}" if stage in report["seconds"] else "–", str(path))
            for stage, path in report["artifacts"].items()
        ],
    )
    return [*(table for section, found in _sections(report) for table in section.tables(found)), stages]


def _sections(report: Mapping[str, Any]) -> Iterator[tuple[Section, Any]]:
    """The sections of the stages that the run had, each with what the report holds for it."""
    return ((section_of(name), found) for name, found in report.items() if name in STAGES)


def _facts(report: Mapping[str, Any]) -> list[str]:
    mlflow = report["mlflow"]
    where = f"{mlflow['tracking_uri']}, run {mlflow['run_id']}" if mlflow["run_id"] else "not recorded there"
    return [*(line for section, found in _sections(report) for line in section.facts(found)), f"MLflow: {where}"]


def _warnings(report: Mapping[str, Any]) -> list[str]:
    return [line for section, found in _sections(report) for line in section.warnings(found)]

"""What was found, for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from launch.doctor.result import CheckResult

STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def table(results: Sequence[CheckResult]) -> RenderableType:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "check", "where", "why, and what to do"):
        shown.add_column(column, overflow="fold")
    for one in results:
        text = Text(one.why).append(f"\n→ {one.what_to_do}" if one.what_to_do else "", style="bold")
        shown.add_row(Text(one.verdict, style=STYLES[one.verdict]), one.check, Text(one.where), text)
    return shown


def summary(results: Sequence[CheckResult], seconds: float) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in results) for verdict in STYLES}
    found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{found}; {seconds:.0f} s"

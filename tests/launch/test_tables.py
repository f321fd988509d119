"""Tables in the terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from launch.report import rich_table
from launch.report.section import Table


def test_names_of_rows_are_not_broken_where_columns_are_narrow() -> None:
    name, figure, shown = "reward/helpfulness.accuracy", "0.84 [0.62, 0.94]", StringIO()
    table = Table("", ("metric", "one", "another"), [(name, figure, figure)])
    Console(file=shown, width=60).print(rich_table(table))
    assert name in shown.getvalue()

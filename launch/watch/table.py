"""A look as tables for the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table

from launch.watch.look import Look
from rlhf.evaluation.statistics import Estimate
from rlhf.serving.watch.series import RESPONSES, VOTES
from rlhf.serving.watch.spans import shown

COUNTS = (RESPONSES, VOTES)
DAY_S = 86_400


def tables(found: Look, span: float) -> Iterator[RenderableType]:
    yield _metrics(found, span)
    if found.drifts:
        yield _drifts(found)
    if found.alarms:
        yield _alarms(found)


def _metrics(found: Look, span: float) -> Table:
    table = Table(title=f"the last {shown(span)}, with 95 % intervals", title_justify="left")
    table.add_column("", no_wrap=True)
    for bucket in found.buckets:
        table.add_column(f"from {moment(bucket.start, span)}", justify="right")
    table.add_column("whole", justify="right")
    for name, whole in found.whole.items():
        cells = [cell(name, bucket.metrics.get(name)) for bucket in found.buckets]
        table.add_row(name, *cells, cell(name, whole))
    return table


def _drifts(found: Look) -> Table:
    table = Table(title="drift from the baseline", title_justify="left")
    for column in ("", "drift", "PSI", "chance", "KS", "p", "n", "baseline"):
        table.add_column(column, justify="left" if column in ("", "drift") else "right", no_wrap=not column)
    for name, one in found.drifts.items():
        numbers = f"{one.psi:.3f}", f"{one.chance:.3f}", f"{one.ks:.3f}", f"{one.p:.1g}"
        table.add_row(name, one.level, *numbers, str(one.n), str(one.baseline_n))
    return table


def _alarms(found: Look) -> Table:
    table = Table(title="alarms", title_justify="left")
    for column in ("began", "ended", "rule", "value"):
        table.add_column(column)
    for one in found.alarms:
        ended = "-" if one.ended is None else moment(one.ended, DAY_S + 1)
        table.add_row(moment(one.began, DAY_S + 1), ended, one.rule, f"{one.value:.4g}")
    return table


def cell(name: str, found: Estimate | None) -> str:
    if found is None:
        return "-"
    if name in COUNTS:
        return f"{found.value:.0f}"
    return f"{found.value:.3g}\n[{found.low:.3g}, {found.high:.3g}]"


def moment(when: float, span: float) -> str:
    return time.strftime("%H:%M" if span <= DAY_S else "%m-%d %H:%M", time.localtime(when))

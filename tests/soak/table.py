"""The record of a soak, as a page for docs/."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tests.soak.schedule import Kind
from tests.soak.strike import Row

TITLE = """# Soak

Random faults over the smoke pipeline on three pseudo-nodes of one machine, each after a new checkpoint in every stage that
runs. "Goes on" is from the fault to the next step of every stage that was struck: a new start of a worker group or of the
driver, and repeated steps are those between the newest checkpoint and the fault. Written by `{command}`.

"""


def page(command: str, rows: Sequence[Row], result: Sequence[str]) -> str:
    """All rows, the same by kind, and what became of the run."""
    parts = [TITLE.format(command=command), *(f"- {line}\n" for line in result), "\n", _by_kind(rows), "\n", _all(rows)]
    return "".join(parts)


def _by_kind(rows: Sequence[Row]) -> str:
    lines = [
        "| fault | how often | noticed after | goes on after | steps repeated |",
        "|---|---|---|---|---|",
    ]
    for kind in Kind:
        own = [row for row in rows if row.fault.kind is kind]
        if own:
            noticed, went_on = ([getattr(row, name) for row in own] for name in ("noticed_s", "went_on_s"))
            repeated = [row.repeated for row in own]
            cells = (kind, str(len(own)), _range(noticed), _range(went_on), f"{min(repeated)}–{max(repeated)}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _all(rows: Sequence[Row]) -> str:
    lines = [
        "| | at | fault | stage and step, node | noticed | goes on | steps repeated |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        at = f"{row.at_s // 60:.0f}:{row.at_s % 60:02.0f}"
        ends = (_seconds(row.noticed_s), _seconds(row.went_on_s), str(row.repeated))
        if row.trouble:
            ends = (row.trouble.replace("|", "/"), "–", "–")
        lines.append(f"| {' | '.join((str(row.fault.number), at, row.fault.kind, row.where, *ends))} |")
    return "\n".join(lines) + "\n"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _range(values: Sequence[float | None]) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "–"
    return f"{median(known):.1f} s" + (f" ({known[0]:.1f}–{known[-1]:.1f})" if len(known) > 1 else "")

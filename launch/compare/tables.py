"""The comparison as tables: for the terminal, and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from launch.report.section import Table

ABREAST = 4  # runs in one table: more do not fit on a terminal
Report = Mapping[str, Any]


def tables(report: Report) -> Iterator[Table]:
    """What is most asked for comes last, where the terminal's cursor is."""
    runs = [run["name"] for run in report["runs"]]
    yield from _in_blocks("Settings that differ", "setting", runs, _settings(report))
    yield from _in_blocks("Results", "metric", runs, _results(report, runs))
    others = [run for run in runs if run != report["baseline"]]
    differences = _differences(report, others)
    yield from _in_blocks(f"Difference to {report['baseline']}, prompt by prompt", "metric", others, differences)
    if seeds := report["seeds"]:
        yield from _over_seeds(seeds)


def _settings(report: Report) -> list[tuple[str, ...]]:
    rows = [(name, *(value or "–" for value in of.values())) for name, of in report["settings"].items()]
    rows += [(f"data, {name}", *((digest or "–")[:8] for digest in of.values())) for name, of in report["data"].items()]
    return rows


def _results(report: Report, runs: Sequence[str]) -> list[tuple[str, ...]]:
    return [(metric, *(_result(of.get(run)) for run in runs)) for metric, of in report["results"].items()]


def _differences(report: Report, others: Sequence[str]) -> list[tuple[str, ...]]:
    found = report["differences"]
    metrics = [metric for metric in report["results"] if any(metric in found[run] for run in others)]
    return [(metric, *(difference(found[run].get(metric)) for run in others)) for metric in metrics]


def _over_seeds(seeds: Mapping[str, Any]) -> Iterator[Table]:
    names, found = list(seeds["variants"]), seeds["results"]
    metrics = list(dict.fromkeys(metric for of in found.values() for metric in of))
    rows = [(metric, *(_result(found[name].get(metric)) for name in names)) for metric in metrics]
    count = max(len(runs) for runs in seeds["variants"].values())
    yield from _in_blocks(f"Mean over up to {count} seeds", "metric", names, rows)
    others = names[1:]
    found = seeds["differences"]
    rows = [(metric, *(difference(found[name].get(metric)) for name in others)) for metric in metrics]
    if any(found.values()):
        yield from _in_blocks(f"Difference to {seeds['baseline']}, seed by seed", "metric", others, rows)


def difference(estimate: Mapping[str, Any] | None) -> str:
    """With its sign; a star where the interval leaves out 0."""
    if estimate is None:
        return "–"
    if estimate["low"] == estimate["high"] == 0:
        return "equal"
    star = " *" if estimate["low"] > 0 or estimate["high"] < 0 else ""
    return f"{precise(estimate, '+')}{star}"


def _result(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "–"
    return precise(result) if "low" in result else f"{result['value']:.4g}"


def precise(estimate: Mapping[str, Any], sign: str = "") -> str:
    """With two digits of its interval's width, so that a small difference is not a row of zeros."""
    width = estimate["high"] - estimate["low"]
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if width <= 0:
        return f"{value:{sign}.3g} [{low:.3g}, {high:.3g}]"
    digits = min(5, max(0, 1 - math.floor(math.log10(width))))
    return f"{value:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _in_blocks(title: str, label: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Iterator[Table]:
    """One table, or several of at most `ABREAST` columns. A row's first cell is its name."""
    if not rows:
        return
    starts = range(0, len(columns), ABREAST)
    for place, start in enumerate(starts, 1):
        end = start + ABREAST
        part = f" ({place} of {len(starts)})" if len(starts) > 1 else ""
        cells = [(row[0], *islice(row, 1 + start, 1 + end)) for row in rows]
        yield Table(f"{title}{part}", (label, *columns[start:end]), cells)

"""What a section of the report consists of, and how figures are written in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Metrics = Mapping[str, Mapping[str, Any]]
"""Part of a stage → the metrics of its manifest."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Section:
    """What the report says of one stage. What comes after `gather` takes what that has made for report.json."""

    gather: Callable[[Path, Metrics], Any]
    """(the run's folder, metrics) → what report.json holds under the stage's name."""
    tables: Callable[[Any], Sequence[Table]] = lambda found: ()
    facts: Callable[[Any], Sequence[str]] = lambda found: ()
    warnings: Callable[[Any], Sequence[str]] = lambda found: ()
    headline: Callable[[Any], Mapping[str, float]] = lambda found: {}
    """The figures by which runs are compared, named for the parent run in MLflow."""
    results: Callable[[Any], Mapping[tuple[str, str], Mapping[str, Any]]] = lambda found: {}
    """(part, metric) → the estimate, or `{"value": …}` alone, of what the stage has made. Where the part keeps values by
    prompt (held_out.jsonl), they have the same name."""
    curves: Callable[[Path], Sequence[Mapping[str, float]]] = lambda folder: ()
    """(the run's folder) → lines with `step`, `time` and those metrics that the parent run in MLflow has too."""
    drawings: Callable[[Any], Mapping[str, tuple[str, Callable[[], bytes]]]] = lambda found: {}
    """File name of each plot → its title, and what draws it."""
    appendix: Callable[[Metrics], Sequence[str]] = lambda metrics: ()
    """Lines for the end of report.md."""


def flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """{"reward": {"safety": estimate}, "gold": estimate} -> ("reward.safety", estimate), ("gold", estimate)."""
    for name, value in metrics.items():
        if "value" not in value:
            yield from flat(value, f"{prefix}{name}.")
        elif value["value"] is not None:  # it was finite
            yield f"{prefix}{name}", value


def nested(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """{"reward.safety": estimate} -> {"reward": {"safety": estimate}}."""
    result: dict[str, Any] = {}
    for name, estimate in metrics.items():
        first, _, rest = name.partition(".")
        if rest:
            result.setdefault(first, {})[rest] = estimate
        else:
            result[first] = estimate
    return result


def interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    return f"{number(estimate['value'])} [{number(estimate['low'])}, {number(estimate['high'])}]"


def number(value: float | None) -> str:
    """Short enough for four columns on a terminal; report.json has all digits. A dash for what was not finite."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def quoted(label: str, text: str) -> list[str]:
    """A label and a text that no Markdown in it can break out of."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"**{label}**", "", f"{fence}text", text, fence, ""]

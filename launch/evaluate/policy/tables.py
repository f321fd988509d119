"""The metrics as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launch.evaluate.tables import at
from launch.report.section import Table, interval

Report = Mapping[str, Any]
FIGURES = {"length": "length, tokens", "eos_rate": "EOS rate", "distinct_2": "distinct bigrams"}
PAIR = {
    "win_rate": "win rate",
    "ties": "ties",
    "length_controlled": "win rate at equal length",
    "difference": "mean difference",
}


def tables(report: Report) -> Iterator[Table]:
    rewards, models = list(report["rewards"]), report["models"]
    figures = {**{f"rewards.{name}": name for name in rewards}, **FIGURES}
    yield _columns("Policies", figures, models)
    for tag in dict.fromkeys(tag for found in models.values() for tag in found.get("by_tag", ())):
        of_tag = {name: found.get("by_tag", {}).get(tag, {}) for name, found in models.items()}
        yield _columns(f"Prompts tagged {tag}", figures, of_tag)
    for name in rewards:
        if pairs := {pair: found[name] for pair, found in report["pairs"].items() if name in found}:
            yield _columns(f"Pairs by {name}", PAIR, pairs)


def _columns(title: str, figures: Mapping[str, str], columns: Mapping[str, Any]) -> Table:
    """A row per figure."""
    rows = [(label, *(interval(at(found, key)) for found in columns.values())) for key, label in figures.items()]
    return Table(title, ("", *columns), rows)

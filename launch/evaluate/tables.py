"""The metrics as tables, one column per model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launch.report.section import Table, interval, number

Models = Mapping[str, Mapping[str, Any]]
GROUPS = {
    "by_rating": "rating",
    "by_source": "file",
    "by_tag": "tag",
    "by_length_gap": "chosen / rejected length",
    "by_turns": "turns of the user",
}
FIGURES = {  # title of a table: {dotted key: how it is called}
    "Accuracy": {
        "accuracy": "accuracy",
        "ties": "ties",
        "floors.longer": "floor: always the longer",
        "floors.shorter": "floor: always the shorter",
        "floors.bag_of_words": "floor: bag of words",
        "above_floors.longer": "accuracy less longer",
        "above_floors.shorter": "accuracy less shorter",
        "above_floors.bag_of_words": "accuracy less bag of words",
    },
    "Calibration": {
        "calibration.ece": "expected calibration error",
        "calibration.brier": "Brier score",
        "calibration.nll": "−log σ(margin)",
        "calibration.temperature": "fitted temperature",
        "calibration.ece_at_temperature": "calibration error at that temperature",
    },
    "Length": {
        "length.chosen_is_longer": "chosen response is longer",
        "length.prefers_longer": "model prefers the longer",
        "length.longer_chosen": "accuracy, chosen is longer",
        "length.shorter_chosen": "accuracy, chosen is shorter",
        "length.correlation": "correlation of margin and length",
        "length.partial_correlation": "margin and preference, given length",
    },
    "Scores": {
        "scores.chosen.mean": "mean, chosen",
        "scores.rejected.mean": "mean, rejected",
        "scores.margin.mean": "mean margin",
        "scores.margin.std": "standard deviation of the margin",
    },
    "Lists": {
        "lists.spearman": "Spearman's rank correlation",
        "lists.kendall": "Kendall's τ",
        "lists.best_is_best": "the best response is the judge's best",
    },
    "Checks": {
        "checks.format": "chat format",
        "checks.begins": "texts begin with BOS (times)",
        "checks.ends": "texts end with a stop token",
        "checks.padding": "largest change of a score by padding",
    },
}


def tables(models: Models, agreements: list[Mapping[str, Any]]) -> Iterator[Table]:
    for title, figures in FIGURES.items():
        rows = [(label, *(_cell(at(report, key)) for report in models.values())) for key, label in figures.items()]
        yield from _table(title, "", models, [row for row in rows if set(row[1:]) != {"–"}])
        if title == "Accuracy":
            yield from _groups(models)
    for key, title in (("reward_bench", "RewardBench"), ("reward_bench_2", "RewardBench 2")):
        yield from _benchmark(models, key, title)
    if agreements:
        yield _agreement(agreements)


def at(report: Mapping[str, Any], key: str) -> Any:
    """The entry under a dotted key; None where there is none."""
    value: Any = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _groups(models: Models) -> Iterator[Table]:
    for key, label in GROUPS.items():
        names = list(dict.fromkeys(name for report in models.values() for name in report.get(key, ())))
        rows = [(name, *(_counted(at(report, key) or {}, name) for report in models.values())) for name in names]
        if len(rows) > 1:
            yield from _table(f"Accuracy by {label}", label, models, rows)


def _counted(group: Mapping[str, Any], name: str) -> str:
    return f"{interval(group[name])}, n = {group[name]['n']}" if name in group else "–"


def _benchmark(models: Models, key: str, title: str) -> Iterator[Table]:
    parts = [report.get(key, {}) for report in models.values()]
    rows = [("score", *(_cell(part.get("score")) for part in parts))] if any("score" in part for part in parts) else []
    for kind in ("sections", "subsets"):
        names = dict.fromkeys(name for part in parts for name in part.get(kind, ()))
        rows += [(name, *(_cell(part.get(kind, {}).get(name)) for part in parts)) for name in names]
    yield from _table(title, "", models, rows)


def _agreement(agreements: list[Mapping[str, Any]]) -> Table:
    rows = [
        (
            f"{pair['a']} and {pair['b']}",
            interval(pair["difference"]),
            f"{pair['only_a']} : {pair['only_b']}",
            f"{pair['mcnemar_p']:.3g}",
            interval(pair["same_preference"]),
            _cell(pair.get("rank_correlation")),
        )
        for pair in agreements
    ]
    columns = ("", "difference in accuracy", "only one right", "McNemar's p", "same preference", "rank correlation")
    return Table("Agreement of models", columns, rows)


def _table(title: str, label: str, models: Models, rows: list[tuple[str, ...]]) -> Iterator[Table]:
    if rows:
        yield Table(title, (label, *models), rows)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return interval(value)
    return number(value) if isinstance(value, int | float | None) else str(value)

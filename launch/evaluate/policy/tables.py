"""The metrics as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launch.evaluate.tables import at
from launch.report.section import Table, interval

Report = Mapping[str, Any]
FIGURES = {
    "kl": "KL to the reference, nats",
    "length": "length, tokens",
    "eos_rate": "EOS rate",
    "refusals.unsafe": "refuses unsafe prompts",
    "refusals.look_alike": "refuses harmless look-alikes",
    "refusals.harmless": "refuses harmless prompts",
    "distinct_2": "distinct bigrams, in a response",
    "diversity.distinct_1": "distinct words, of a prompt",
    "diversity.distinct_2": "distinct bigrams, of a prompt",
    "diversity.self_bleu": "self-BLEU",
}
PAIR = {
    "win_rate": "win rate",
    "ties": "ties",
    "length_controlled": "win rate at equal length",
    "difference": "mean difference",
    "orders_agree": "both orders agree",
    "first_shown": "the response shown first is preferred",
}


def tables(report: Report) -> Iterator[Table]:
    rewards, models = list(report["rewards"]), report["models"]
    figures = {**{f"rewards.{name}": name for name in rewards}, **FIGURES}
    yield _columns("Policies", figures, models)
    tasks = [
        (f"tasks.{task}.{metric}", f"{task}, {metric}")
        for task, found in next(iter(models.values())).get("tasks", {}).items()
        for metric in found
    ]
    if tasks:
        yield _columns("Tasks of lm-eval", dict(tasks), models)
    for tag in dict.fromkeys(tag for found in models.values() for tag in found.get("by_tag", ())):
        of_tag = {name: found.get("by_tag", {}).get(tag, {}) for name, found in models.items()}
        yield _columns(f"Prompts tagged {tag}", figures, of_tag)
    yield from _temperatures(figures, models)
    for name in rewards:
        yield from _best_of_n(name, models)
    for name in preferring(report):
        if pairs := {pair: found[name] for pair, found in report["pairs"].items() if name in found}:
            yield _columns(f"Pairs by {name}", PAIR, pairs)


def preferring(report: Report) -> list[str]:
    """What prefers one policy to another: rewards, and the judge."""
    of_pairs = report["pairs"].values()
    return list(dict.fromkeys(name for found in of_pairs for name, own in found.items() if "win_rate" in own))


def _columns(title: str, figures: Mapping[str, str], columns: Mapping[str, Any]) -> Table:
    """A row per figure."""
    rows = [(label, *(interval(at(found, key)) for found in columns.values())) for key, label in figures.items()]
    return Table(title, ("", *columns), [row for row in rows if set(row[1:]) != {"–"}])


def _temperatures(figures: Mapping[str, str], models: Mapping[str, Any]) -> Iterator[Table]:
    for name, found in models.items():
        if "by_temperature" in found:
            yield _columns(f"{name} by temperature", figures, found["by_temperature"])


def _best_of_n(reward: str, models: Mapping[str, Any]) -> Iterator[Table]:
    """A row per number of samples, a column per policy and reward by which the best one is valued."""
    curves = {
        f"{name}, {valued}" if len(models) > 1 else valued: curve
        for name, found in models.items()
        for valued, curve in found.get("best_of_n", {}).get(reward, {}).items()
    }
    if curves:
        sizes = [point["size"] for point in next(iter(curves.values()))]
        rows = [
            (str(n), *(interval(curve[place]["score"]) for curve in curves.values())) for place, n in enumerate(sizes)
        ]
        yield Table(f"Best of n by {reward}", ("n", *curves), rows)

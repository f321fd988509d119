"""The plots of `rlhf evaluate reward`: one function per plot, each from the reports of the models. Dots with bars are
estimates with their 95 % intervals; a colour is a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.plots import (
    HELD_OUT,
    REFERENCE,
    add_legend,
    chance_line,
    colours_of,
    drawn_as_svg,
    error_bars,
    new_figure,
    set_labels,
    with_errors,
)
from rlhf.evaluation.calibration import BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Reports = Mapping[str, Mapping[str, Any]]
FLOORS = {"longer": "always the longer", "shorter": "always the shorter", "bag_of_words": "bag of words"}
LENGTHS = {
    "under_0.5": "< ½",
    "0.5_to_0.8": "½ – 0.8",
    "0.8_to_1.25": "0.8 – 1¼",
    "1.25_to_2": "1¼ – 2",
    "2_and_more": "≥ 2",
}


def plots(reports: Reports) -> dict[str, bytes]:
    """Title → SVG of every plot that these reports, of models on pairs, can fill."""
    found = {
        "Accuracy against floors": accuracy(reports),
        "Calibration": reliability(reports),
        "Accuracy by length": by_length(reports),
        "Scores and margins": distributions(reports),
    }
    if any(len(report["by_rating"]) > 1 for report in reports.values()):
        found["Accuracy by rating"] = by_group(reports, "by_rating")
    if any(len(report["by_source"]) > 1 for report in reports.values()):
        found["Accuracy by file"] = by_group(reports, "by_source")
    return found


@drawn_as_svg
def accuracy(reports: Reports) -> Figure:
    """The models and, in grey, what reads no meaning, from the best down."""
    first = next(iter(reports.values()))
    colours = dict(zip(reports, colours_of(reports), strict=True))
    entries = [(name, report["accuracy"], colours[name]) for name, report in reports.items()]
    entries += [(FLOORS[name], floor, REFERENCE) for name, floor in first["floors"].items()]
    entries.sort(key=lambda entry: entry[1]["value"])
    figure, (axes,) = new_figure(1, 1)
    figure.set_figheight(1.4 + 0.4 * len(entries))
    for place, (_, estimate, colour) in enumerate(entries):
        axes.errorbar(
            estimate["value"], place, xerr=error_bars([estimate]), fmt="o", color=colour, capsize=3, markersize=7
        )
        axes.annotate(
            f"{estimate['value']:.3f}", (estimate["value"], place), (0, 7), textcoords="offset points", ha="center"
        )
    axes.axvline(0.5, color=REFERENCE, linestyle="--")
    axes.set_yticks(range(len(entries)), [name for name, *_ in entries])
    axes.set_ylim(-0.6, len(entries) - 0.2)
    set_labels(axes, "Accuracy, 95 % intervals; grey: floors", "proportion of pairs; dashed: chance", "")
    return figure


@drawn_as_svg
def reliability(reports: Reports) -> Figure:
    figure, (curve, counts) = new_figure(1, 2)
    for (name, report), colour in zip(reports.items(), colours_of(reports), strict=True):
        bins = report["calibration"]["bins"]
        predicted = [one["predicted"] for one in bins]
        with_errors(curve, predicted, [one["observed"] for one in bins], colour, name, "-")
        count_of = {one["low"]: one["observed"]["n"] for one in bins}
        total = sum(count_of.values())
        edges = [0.5 + 0.5 * number / BINS for number in range(BINS + 1)]
        counts.stairs([count_of.get(low, 0) / total for low in edges[:-1]], edges, color=colour, linewidth=1.8)
    curve.plot([0.5, 1], [0.5, 1], color=REFERENCE, linestyle="--", label="calibrated")
    curve.set_ylim(None, 1.02)
    set_labels(curve, "Reliability", "confidence σ(|margin|)", "accuracy")
    counts.set_ylim(0, None)
    set_labels(counts, "How sure the model is", "confidence σ(|margin|)", "proportion of pairs")
    add_legend(figure)
    return figure


@drawn_as_svg
def by_length(reports: Reports) -> Figure:
    figure, (axes,) = new_figure(1, 1)
    for (name, report), colour, shift in _side_by_side(reports):
        there = [(place + shift, report["by_length_gap"].get(key)) for place, key in enumerate(LENGTHS)]
        _dots(axes, there, colour, name)
    axes.set_xticks(range(len(LENGTHS)), list(LENGTHS.values()))
    chance_line(axes)
    axes.set_ylim(-0.02, 1.02)
    set_labels(axes, "Accuracy by length", "length of the chosen response / of the rejected one", "proportion of pairs")
    add_legend(figure)
    return figure


@drawn_as_svg
def by_group(reports: Reports, key: str) -> Figure:
    groups = list(dict.fromkeys(group for report in reports.values() for group in report[key]))
    figure, (axes,) = new_figure(1, 1)
    figure.set_figheight(1.8 + (0.25 + 0.15 * len(reports)) * len(groups))
    for (name, report), colour, shift in _side_by_side(reports):
        there = [(place + shift, report[key][group]) for place, group in enumerate(groups) if group in report[key]]
        shown = [estimate for _, estimate in there]
        axes.errorbar(
            [estimate["value"] for estimate in shown],
            [place for place, _ in there],
            xerr=error_bars(shown),
            fmt="o",
            color=colour,
            capsize=3,
            label=name,
        )
    axes.set_yticks(range(len(groups)), [group.rsplit("/", 1)[-1] for group in groups])
    axes.invert_yaxis()
    axes.axvline(0.5, color=REFERENCE, linestyle="--", label="chance")
    title = {"by_rating": "Accuracy by rating", "by_source": "Accuracy by file"}[key]
    set_labels(axes, title, "proportion of pairs", "")
    add_legend(figure)
    return figure


@drawn_as_svg
def distributions(reports: Reports) -> Figure:
    """A row per model: scores of both sides, and margins, of which those left of 0 are mistakes."""
    figure, panels = new_figure(len(reports), 2)
    for number, ((name, report), colour) in enumerate(zip(reports.items(), colours_of(reports), strict=True)):
        sides, margins = panels[2 * number : 2 * number + 2]
        histogram = report["scores"]["histogram"]
        sides.stairs(
            histogram["chosen"], histogram["edges"], color=colour, fill=True, alpha=0.5, label=f"{name}: chosen"
        )
        sides.stairs(histogram["rejected"], histogram["edges"], color=HELD_OUT, linewidth=1.5, label="rejected")
        set_labels(sides, f"Scores of {name}", "score", "responses")
        margins.stairs(histogram["margin"], histogram["margin_edges"], color=colour, fill=True, alpha=0.5)
        margins.axvline(0, color=HELD_OUT, linewidth=1)
        set_labels(margins, "Margins: left of 0 is wrong", "score of chosen − rejected", "pairs")
    add_legend(figure)
    return figure


def _side_by_side(reports: Reports) -> list[tuple[tuple[str, Mapping[str, Any]], str, float]]:
    """Each model with its colour, and how far its dots stand from the middle of their place."""
    middle = (len(reports) - 1) / 2
    return [
        (entry, colour, 0.12 * (number - middle))
        for number, (entry, colour) in enumerate(zip(reports.items(), colours_of(reports), strict=True))
    ]


def _dots(axes: Axes, there: Sequence[tuple[float, Any]], colour: str, name: str) -> None:
    known = [(place, estimate) for place, estimate in there if estimate is not None]
    with_errors(axes, [place for place, _ in known], [estimate for _, estimate in known], colour, name, "")

"""The plots of `rlhf evaluate policy`: one function per plot, from the report. Dots with bars are estimates with their 95 %
intervals; a colour is a policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.evaluate.policy.tables import FIGURES, preferring
from launch.evaluate.tables import at
from launch.plots import (
    HELD_OUT,
    REFERENCE,
    add_legend,
    colours_of,
    drawn_as_svg,
    error_bars,
    new_figure,
    new_panels,
    set_labels,
    with_errors,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]


def plots(report: Report) -> dict[str, bytes]:
    """Title → SVG of every plot that this report can fill."""
    found = {"Policies": policies(report)}
    if preferring(report):
        found["Win rates"] = win_rates(report)
    if any(model.get("best_of_n") for model in report["models"].values()):
        found["Best of n"] = best_of_n(report)
    if any("by_temperature" in model for model in report["models"].values()):
        found["Temperature"] = temperatures(report)
    return found


@drawn_as_svg
def policies(report: Report) -> Figure:
    """A panel per reward and per figure of form, a row per policy."""
    models = report["models"]
    keys = {**{f"rewards.{name}": name for name in report["rewards"]}, **FIGURES}
    keys = {key: label for key, label in keys.items() if any(at(found, key) for found in models.values())}
    figure, panels, columns = new_panels(len(keys), 3)
    figure.set_figheight((1.0 + 0.33 * len(models)) * -(-len(keys) // columns) + 0.3)
    for number, (axes, (key, label)) in enumerate(zip(panels, keys.items(), strict=True)):
        _rows(axes, {name: at(found, key) for name, found in models.items()}, colours_of(models))
        axes.set_title(label)
        if number % columns:
            axes.set_yticklabels([])
    return figure


@drawn_as_svg
def win_rates(report: Report) -> Figure:
    """A panel per reward, a row per pair: raw, and at equal length."""
    pairs, rewards = report["pairs"], preferring(report)
    figure, panels = new_figure(len(rewards), 1)
    figure.set_figheight((1.2 + 0.4 * len(pairs)) * len(rewards) + 0.4)
    for axes, name in zip(panels, rewards, strict=True):
        for key, shift, fill, label in (
            ("win_rate", -0.12, HELD_OUT, "raw"),
            ("length_controlled", 0.12, "white", "at equal length"),
        ):
            shown = [(n, found[name][key]) for n, found in enumerate(pairs.values()) if key in found.get(name, ())]
            estimates = [estimate for _, estimate in shown]
            axes.errorbar(
                [estimate["value"] for estimate in estimates],
                [n + shift for n, _ in shown],
                xerr=error_bars(estimates),
                fmt="o",
                color=HELD_OUT,
                markerfacecolor=fill,
                capsize=3,
                label=label,
            )
        axes.axvline(0.5, color=REFERENCE, linestyle="--")
        axes.set_yticks(range(len(pairs)), list(pairs))
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        set_labels(axes, f"Win rate of the first by {name}", "", "")
    panels[-1].set_xlabel("proportion of prompts, a tie counts half; dashed: even")
    add_legend(figure)
    return figure


@drawn_as_svg
def best_of_n(report: Report) -> Figure:
    """A row per reward that selects, a column per reward that values: the diagonal rises, the others tell what it is worth."""
    rewards = list(report["rewards"])
    figure, panels = new_figure(len(rewards), len(rewards))
    for number, axes in enumerate(panels):
        selects, values = rewards[number // len(rewards)], rewards[number % len(rewards)]
        for (name, model), colour in zip(report["models"].items(), colours_of(report["models"]), strict=True):
            curve = model.get("best_of_n", {}).get(selects, {}).get(values, [])
            _line(axes, [(point["size"], point["score"]) for point in curve], colour, name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        set_labels(axes, f"{values}, best of n by {selects}", "n", "mean score")
    add_legend(figure)
    return figure


@drawn_as_svg
def temperatures(report: Report) -> Figure:
    keys = {**{f"rewards.{name}": name for name in report["rewards"]}, **FIGURES}
    series = {name: model.get("by_temperature", {}) for name, model in report["models"].items()}
    keys = {key: label for key, label in keys.items() if any(at(f, key) for by in series.values() for f in by.values())}
    figure, panels, _ = new_panels(len(keys), 3)
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        for (name, by), colour in zip(series.items(), colours_of(series), strict=True):
            _line(axes, [(float(t), at(f, key)) for t, f in by.items() if at(f, key)], colour, name)
        set_labels(axes, label, "temperature", "")
    add_legend(figure)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, Any]], colour: str, name: str) -> None:
    if points:
        with_errors(axes, [x for x, _ in points], [estimate for _, estimate in points], colour, name, "-")


def _rows(axes: Axes, estimates: Mapping[str, Any], colours: list[str]) -> None:
    """An estimate per row, with its value."""
    for place, (estimate, colour) in enumerate(zip(estimates.values(), colours, strict=True)):
        if estimate is not None:
            value = estimate["value"]
            axes.errorbar(value, place, xerr=error_bars([estimate]), fmt="o", color=colour, capsize=3)
            axes.annotate(f"{value:.3g}", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.set_ylim(len(estimates) - 0.5, -0.7)
    axes.margins(x=0.12)

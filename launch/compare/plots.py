"""The plots of `rlhf compare`: results with their intervals, and curves. A colour is a run, or the runs of one variant.

Lines are training, dots are held-out data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.plots import REFERENCE, add_legend, drawn_as_svg, error_bars, new_panels, set_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]
Points = Sequence[Sequence[float]]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#202020")  # Okabe and Ito
COLUMNS = 3
PANELS = (  # title, unit, training metric, held-out metric
    ("SFT loss", "nats per token", "sft/loss", "sft/held_out_loss"),
    ("Reward model: loss", "nats per pair", "reward/loss", ""),
    ("Reward model: accuracy", "proportion of held-out pairs", "", "reward/held_out_accuracy"),
    ("DPO loss", "nats per pair", "dpo/loss", "dpo/held_out_loss"),
    ("DPO: accuracy", "proportion of held-out pairs", "", "dpo/held_out_accuracy"),
    ("PPO: reward", "score", "ppo/reward", "eval/reward"),
    ("PPO: KL to the SFT model", "nats per response", "ppo/kl", "eval/kl"),
    ("PPO: gold", "0 to 1", "", "eval/gold"),
)
WINDOWS = 25  # a training curve is smoothed over so large a part of it


def plots(report: Report) -> dict[str, bytes]:
    """Title → SVG of every plot that these runs can fill."""
    found: dict[str, bytes] = {}
    if any(_differ(of) for of in report["differences"].values()):
        found["Differences"] = differences(report)
    if shown := list(panels(report["curves"])):
        found["Curves"] = curves(report, shown)
    if any("low" in result for of in report["results"].values() for result in of.values()):
        found["Results"] = results(report)
    return found


@drawn_as_svg
def differences(report: Report) -> Figure:
    """Of each run to the first, a panel per metric in which one differs. Right of the line is more."""
    others = [run for run in report["differences"] if report["differences"][run]]
    found = {metric: {run: report["differences"][run].get(metric) for run in others} for metric in report["results"]}
    values = {metric: of for metric, of in found.items() if _differ(of)}
    figure = _forest(report, values, others)
    for axes in figure.axes[: len(values)]:
        axes.axvline(0, color=REFERENCE, linestyle="--")
    figure.suptitle(f"Difference to {report['baseline']}, prompt by prompt, 95 % intervals", x=0.01, ha="left")
    return figure


@drawn_as_svg
def results(report: Report) -> Figure:
    runs = [run["name"] for run in report["runs"]]
    values = {
        metric: {run: of.get(run) for run in runs}
        for metric, of in report["results"].items()
        if any("low" in result for result in of.values())
    }
    figure = _forest(report, values, runs)
    figure.suptitle("Results, 95 % intervals", x=0.01, ha="left")
    return figure


@drawn_as_svg
def curves(report: Report, shown: Sequence[tuple[str, str, str, str]]) -> Figure:
    colours, names = colours_of(report), labels_of(report)
    figure, all_axes, _ = new_panels(len(shown), COLUMNS)
    for axes, (title, unit, training, held_out) in zip(all_axes, shown, strict=True):
        for run, own in report["curves"].items():
            _curve(axes, own.get(training, ()), own.get(held_out, ()), colours[run], names[run])
        set_labels(axes, title, "step", unit)
    add_legend(figure)
    figure.suptitle("Curves: lines are training, dots are held-out data", x=0.01, ha="left")
    return figure


def panels(curves: Mapping[str, Mapping[str, Points]]) -> Iterator[tuple[str, str, str, str]]:
    """Those in which runs differ, one for each reward model: stages that runs share say nothing."""
    metrics = dict.fromkeys(metric for own in curves.values() for metric in own)
    for title, unit, training, held_out in PANELS:
        kinds = [metric.partition(" (")[::2] for metric in metrics if metric.partition(" (")[0] in (training, held_out)]
        for name in dict.fromkeys(name for _, name in kinds):
            suffix = f" ({name}" if name else ""
            keys = [f"{metric}{suffix}" if metric else "" for metric in (training, held_out)]
            seen = {repr([own.get(key) for key in keys]) for own in curves.values()}
            if len(seen) > 1 or len(curves) == 1:
                yield f"{title}{suffix}", unit, keys[0], keys[1]


def colours_of(report: Report) -> dict[str, Any]:
    """Run → colour; the runs of a variant share theirs."""
    groups = _groups(report)
    colours: list[Any] = list(COLOURS)
    if len(groups) > len(COLOURS):
        from matplotlib import colormaps

        colours = [colormaps["viridis"](place / (len(groups) - 1) * 0.92) for place in range(len(groups))]
    return {run: colour for runs, colour in zip(groups.values(), colours, strict=False) for run in runs}


def _groups(report: Report) -> Mapping[str, Sequence[str]]:
    """What has a colour of its own: a variant, or a run where all are seeds of one variant."""
    variants = report["seeds"].get("variants", {})
    return variants if len(variants) > 1 else {run["name"]: [run["name"]] for run in report["runs"]}


def labels_of(report: Report) -> dict[str, str]:
    """Run → its place in the legend: its variant where there are seeds."""
    groups = _groups(report)
    return {run: group for group, runs in groups.items() for run in runs}


def _differ(of: Mapping[str, Any]) -> bool:
    """Whether any run is not equal to the first."""
    return any(one is not None and (one["low"], one["high"]) != (0, 0) for one in of.values())


def _curve(axes: Axes, training: Points, held_out: Points, colour: Any, name: str) -> None:
    if training:
        steps, values = zip(*training, strict=True)
        smooth = _running_mean(values, max(1, len(values) // WINDOWS))
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25 if smooth != list(values) else 0)
        axes.plot(steps, smooth, color=colour, linewidth=1.6, label=name)
    if held_out:
        steps, values = zip(*held_out, strict=True)
        line = ":" if training else "-"
        axes.plot(steps, values, f"o{line}", color=colour, markersize=3.5, label=None if training else name)


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Over `window` values on each side, fewer at the ends."""
    parts = (values[max(0, place - window + 1) : place + window] for place in range(len(values)))
    return [sum(part) / len(part) for part in parts]


def _forest(report: Report, values: Mapping[str, Mapping[str, Any]], runs: Sequence[str]) -> Figure:
    """A panel per metric with a row per run."""
    colours = colours_of(report)
    figure, all_axes, columns = new_panels(len(values), COLUMNS)
    figure.set_figheight(0.6 + -(-len(values) // columns) * (0.75 + 0.24 * len(runs)))
    for number, (axes, (metric, of)) in enumerate(zip(all_axes, values.items(), strict=True)):
        for place, run in enumerate(runs):
            if (one := of.get(run)) is not None and "low" in one:
                axes.errorbar(one["value"], place, xerr=error_bars([one]), fmt="o", color=colours[run], capsize=3)
        axes.set_yticks(range(len(runs)), runs if number % columns == 0 else [""] * len(runs))
        axes.set_ylim(len(runs) - 0.4, -0.6)
        axes.locator_params(axis="x", nbins=5)
        set_labels(axes, metric, "", "")
    return figure

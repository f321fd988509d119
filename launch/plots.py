"""The plots of the closing report. Matplotlib is imported at first use, and never opens a window.

Lines are training, dots are held-out data; a colour means one policy or one reward model in every plot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from io import BytesIO
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
Points = Sequence[tuple[float, float]]
Series = Mapping[str, Points]  # metric name -> (step, value), as rlhf.tracking.read_metrics gives them

# Okabe and Ito's palette, which people with any colour vision can tell apart.
POLICIES = {"base": "#7f7f7f", "sft": "#0072b2", "ppo": "#d55e00"}
MODELS = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
HELD_OUT, REFERENCE = "#202020", "#a8a8a8"
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#e8e8e8",
    "font.size": 9.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "",
}


def drawn(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """A function that draws a figure becomes one that returns it as PNG, in the style of this file."""
    return _saved(draw, "png")


def drawn_as_svg(draw: Callable[P, Figure]) -> Callable[P, bytes]:
    """The same as SVG, whose text stays text."""
    return _saved(draw, "svg")


def _saved(draw: Callable[P, Figure], kind: str) -> Callable[P, bytes]:
    @wraps(draw)
    def saved(*arguments: P.args, **keywords: P.kwargs) -> bytes:
        from matplotlib import rc_context

        content = BytesIO()
        with rc_context(STYLE):
            draw(*arguments, **keywords).savefig(
                content, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None
            )
        return content.getvalue()

    return saved


@drawn
def reward_accuracy(reports: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Held-out accuracy by rating and calibration of each reward model, with 95 % intervals."""
    figure, (by_rating, calibration) = new_figure(1, 2)
    groups = list(dict.fromkeys(rating for report in reports.values() for rating in report["by_rating"]))
    columns = ["all", *groups]
    width = 0.8 / len(reports)
    for number, ((name, report), colour) in enumerate(zip(reports.items(), colours_of(reports), strict=True)):
        estimates = {"all": report["accuracy"], **report["by_rating"]}
        shift = width * (number - (len(reports) - 1) / 2)
        places = [place + shift for place, column in enumerate(columns) if column in estimates]
        shown = [estimates[column] for column in columns if column in estimates]
        heights = [estimate["value"] for estimate in shown]
        by_rating.bar(places, heights, 0.9 * width, color=colour, label=name, yerr=error_bars(shown), ecolor="#404040")
        bins = report["calibration"]
        observed = [one["observed"] for one in bins]
        with_errors(calibration, [one["predicted"] for one in bins], observed, colour, name, "-")
    by_rating.set_xticks(range(len(columns)), columns, rotation=20)
    by_rating.set_ylim(0, 1.05)
    chance_line(by_rating)
    set_labels(by_rating, "Held-out accuracy, 95 % intervals", "", "proportion of pairs")
    calibration.plot([0.5, 1], [0.5, 1], color=REFERENCE, linestyle="--", label="calibrated")
    set_labels(calibration, "Calibration", "predicted: σ(score gap)", "observed proportion")
    add_legend(figure)
    return figure


@drawn
def held_out(policies: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Every held-out figure of base, SFT and PPO with its 95 % interval; `policies[policy][figure]` is an estimate."""
    names = list(dict.fromkeys(name for metrics in policies.values() for name in metrics))
    figure, panels, _ = new_panels(len(names), 3)
    for axes, name in zip(panels, names, strict=True):
        for place, (policy, metrics) in enumerate(policies.items()):
            if name in metrics:
                with_errors(axes, [place], [metrics[name]], POLICIES[policy], policy, "")
        axes.set_xticks(range(len(policies)), list(policies))
        axes.set_xlim(-0.6, len(policies) - 0.4)
        set_labels(axes, name, "", "")
    figure.suptitle("Responses to held-out prompts, 95 % intervals", x=0.01, horizontalalignment="left")
    return figure


def new_figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.4, 4.2 * columns), 3.0 * rows + 0.8), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def new_panels(count: int, abreast: int) -> tuple[Figure, list[Axes], int]:
    """`count` panels, at most `abreast` in a row, and how many stand in a row. Places that are left over stay empty."""
    columns = min(count, abreast)
    figure, panels = new_figure(-(-count // columns), columns)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count], columns


def with_errors(
    axes: Axes, places: Sequence[float], estimates: Sequence[Mapping[str, float]], colour: str, label: str, line: str
) -> None:
    values = [estimate["value"] for estimate in estimates]
    axes.errorbar(places, values, error_bars(estimates), fmt=f"o{line}", color=colour, capsize=3, label=label)


def error_bars(estimates: Sequence[Mapping[str, float]]) -> list[list[float]]:
    return [
        [estimate["value"] - estimate["low"] for estimate in estimates],
        [estimate["high"] - estimate["value"] for estimate in estimates],
    ]


def chance_line(axes: Axes) -> None:
    axes.axhline(0.5, color=REFERENCE, linestyle="--", label="chance")


def set_labels(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def add_legend(figure: Figure) -> None:
    """One legend under all panels, each label once."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=len(entries))


def colours_of(names: Mapping[str, Any]) -> list[str]:
    return [MODELS[number % len(MODELS)] for number in range(len(names))]

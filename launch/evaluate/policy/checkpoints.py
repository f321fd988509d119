"""`rlhf evaluate policy RUN… --checkpoints`: reward against KL over the evaluations that PPO made, and over-optimisation.

Nothing is sampled: a run keeps what each of its evaluations measured on every prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.evaluate import output
from launch.evaluate.inputs import model_names
from launch.evaluate.metrics import as_json
from launch.evaluate.page import Page
from launch.evaluate.tables import at
from launch.plots import REFERENCE, colours_of, drawn_as_svg, error_bars, new_panels, set_labels
from launch.report.section import Table, interval
from rlhf.errors import UserError
from rlhf.evaluation.over_optimization import PROXY, Evaluation, frontier, over_optimization
from rlhf.ppo.evaluator import EVALUATIONS
from rlhf.tracking.jsonl import read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOLD = "gold"
FORM = ("kl", "length")  # series that are no scores

Report = Mapping[str, Any]


def evaluate_checkpoints(runs: Sequence[str], out: Path, tracking_uri: str | None) -> dict[str, Any]:
    """Writes report.json, report.md and report.html into `out`. UserError (4) for a run without evaluations."""
    output.check_folder(out)
    folders = dict(zip(model_names(runs), map(Path, runs), strict=True))
    report = as_json({"runs": {name: run_metrics(folder) for name, folder in folders.items()}})
    out.mkdir(parents=True, exist_ok=True)
    output.write(out, report, page_of(report))
    parts = {
        name: {"last": found["evaluations"][-1], **found.get("over_optimization", {})}
        for name, found in report["runs"].items()
    }
    places = {name: str(folder) for name, folder in folders.items()}
    output.track(out, places, output.with_names(parts), tracking_uri)
    return report


def run_metrics(folder: Path) -> dict[str, Any]:
    evaluations, prompts = read_evaluations(folder)
    found: dict[str, Any] = {"run": str(folder), "prompts": len(prompts), "evaluations": frontier(evaluations, prompts)}
    if GOLD in evaluations[-1].values:
        found["over_optimization"] = over_optimization(evaluations, prompts, GOLD)
    return found


def read_evaluations(folder: Path) -> tuple[list[Evaluation], list[str]]:
    """The evaluations of a run, or of its stage's folder, by iteration, and their prompts."""
    places = (folder / "ppo" / EVALUATIONS, folder / EVALUATIONS)
    path = next((place for place in places if place.is_file()), None)
    lines = {line["step"]: line for line, _ in read_lines(path)} if path else {}
    if not lines:
        raise UserError(f"{folder}: no evaluations of PPO: there is no {places[0]}; give the folder of a run", 4)
    prompts = lines[min(lines)]["prompts"]
    return [Evaluation(step, line["values"]) for step, line in sorted(lines.items())], prompts


def tables(report: Report) -> Iterator[Table]:
    runs = report["runs"]
    if shown := {name: run["over_optimization"] for name, run in runs.items() if "over_optimization" in run}:
        yield Table(
            "After the best evaluation",
            ("run", "iterations", "proxy", "gold", "over-optimised"),
            [
                (
                    name,
                    f"{found['from_step']} to {found['to_step']}",
                    interval(found.get("proxy")),
                    interval(found.get("truth")),
                    verdict(found),
                )
                for name, found in shown.items()
            ],
        )
    for name, run in runs.items():
        series = series_of(run)
        rows = [(str(one["step"]), *(interval(one.get(key)) for key in series)) for one in run["evaluations"]]
        yield Table(f"Evaluations of {name}", ("iteration", *series), rows)


def verdict(found: Report) -> str:
    if found["from_step"] == found["to_step"]:
        return "not shown: gold is best at the end"
    if found["falls"]:
        return "yes: the proxy rises and gold falls"
    return "yes: the proxy rises and gold does not" if found["shown"] else "not shown"


def series_of(run: Report) -> list[str]:
    return [key for key in run["evaluations"][-1] if key != "step"]


def page_of(report: Report) -> Page:
    return Page(
        title=f"Checkpoints of {', '.join(report['runs'])}",
        notes=[
            *(f"{name}: {run['run']}, {run['prompts']} prompts" for name, run in report["runs"].items()),
            "proxy: the reward that PPO maximises",
            "changes: from the evaluation with the best gold to the last, prompt by prompt; half of the prompts choose it, "
            + "the other half measure",
        ],
        warnings=[],
        tables=list(tables(report)),
        plots={"Reward against KL": against_kl(report), "By iteration": by_iteration(report)},
        examples=[],
        examples_title="",
    )


@drawn_as_svg
def against_kl(report: Report) -> Figure:
    return _curves(report, lambda one: at(one, "kl.value"), "KL to the SFT policy, nats per response")


@drawn_as_svg
def by_iteration(report: Report) -> Figure:
    return _curves(report, lambda one: one["step"], "iteration")


def _curves(report: Report, place: Any, label: str) -> Figure:
    """A panel per score, a line per run."""
    runs = report["runs"]
    scores = list(dict.fromkeys(key for run in runs.values() for key in series_of(run) if key not in FORM))
    scores.sort(key=lambda key: (key != PROXY, key != GOLD))
    figure, panels, _ = new_panels(len(scores), 2)
    for axes, key in zip(panels, scores, strict=True):
        for (name, run), colour in zip(runs.items(), colours_of(runs), strict=True):
            shown = [one for one in run["evaluations"] if key in one and "kl" in one]
            estimates = [one[key] for one in shown]
            values = [estimate["value"] for estimate in estimates]
            axes.errorbar([place(one) for one in shown], values, error_bars(estimates), color=REFERENCE, fmt="none")
            axes.plot([place(one) for one in shown], values, "o-", color=colour, label=name, markersize=4)
        set_labels(axes, f"{key} (proxy)" if key == PROXY else key, label, "mean score")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def show(report: Report, out: Path) -> None:
    output.show(out, list(tables(report))[:1], [], "all evaluations are there")

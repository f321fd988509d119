"""The closing report of a run: report.json for programs, report.md and plots for people, a table for the terminal.

All figures come from the manifests and metrics of the stages; docs/metrics.md defines them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import plots, profile_table
from rlhf.config import RunConfig
from rlhf.ppo import alarms
from rlhf.runs.artifacts import load, write_atomic, write_json
from rlhf.tracking import read_metrics

if TYPE_CHECKING:
    from rich.console import RenderableType

POLICIES = ("base", "sft", "ppo")
SAMPLES = 10
PLOTS = {
    "reward_accuracy": "Reward models: held-out accuracy by rating, calibration",
    "held_out": "Base, SFT and PPO on held-out prompts",
}


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def build(folder: Path, config: RunConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, report.md and plots/*.png into the run's folder and return the report.

    `extra`: {"seconds": {stage: s}, "artifacts": {stage: path}, "mlflow": {"tracking_uri": …, "run_id": …}}.
    Raises UserError(4) when a stage is not complete.
    """
    names = list(config.reward.models)
    metrics = {stage: load(folder / stage / "artifact").metrics for stage in _stages(names)}
    report = {
        "run": config.name,
        "sft": {key.removeprefix("sft/"): value for key, value in metrics["sft"].items()},
        "reward": {name: metrics[f"reward/{name}"] for name in names},
        "ppo": {
            **{key: value for key, value in metrics["ppo"].items() if key != "samples"},
            "held_out": {policy: _nested(metrics["ppo"]["held_out"][policy]) for policy in POLICIES},
            "gain": _nested(metrics["ppo"]["gain"]),
            "profile": profile_table.account(read_metrics(folder / "ppo")),
        },
        **extra,
    }
    (folder / "plots").mkdir(exist_ok=True)
    for name, draw in _drawings(report).items():
        write_atomic(folder / "plots" / f"{name}.png", draw())
    write_atomic(folder / "report.md", markdown(report, metrics["ppo"].get("samples", [])))
    write_json(folder / "report.json", report)
    return report


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The figures by which runs are compared, named for the parent run in MLflow: eval/<policy>/…, eval/accuracy_…."""
    metrics = {f"eval/accuracy_{name}": model["accuracy"]["value"] for name, model in report["reward"].items()}
    for policy in POLICIES:
        for name, estimate in flat(report["ppo"]["held_out"][policy]):
            metrics[f"eval/{policy}/{name.replace('.', '_')}"] = estimate["value"]
    return metrics


def render(report: Mapping[str, Any]) -> RenderableType:
    """What the terminal shows at the end of a run."""
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    parts: list[RenderableType] = []
    for table in tables(report):
        shown = RichTable(
            title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
        )
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in table.rows:
            shown.add_row(*map(Text, row))
        parts.append(shown)
    warnings = (Text(f"warning: {line}", style="yellow") for line in _warnings(report))
    return Group(*warnings, *parts, *(Text(line) for line in _facts(report)))


def markdown(report: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"# Report of `{report['run']}`",
        "",
        "Definitions and units: `docs/metrics.md`. Brackets: 95 % intervals.",
        *(f"\n> **Warning.** {line}" for line in _warnings(report)),
    ]
    for table in tables(report):
        lines += ["", f"## {table.title}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (table.columns, ("---",) * len(table.columns), *table.rows)]
    lines += ["", *(f"- {line}" for line in _facts(report)), "", "## Plots"]
    for name, title in PLOTS.items():
        lines += ["", f"![{title}](plots/{name}.png)"]
    if samples:
        lines += ["", "## Held-out prompts, answered before and after PPO"]
    for number, sample in enumerate(samples[:SAMPLES], 1):
        lines += ["", f"### {number}", "", *_quoted("Prompt", sample["prompt"])]
        for policy in ("sft", "ppo"):
            scores = ", ".join(
                f"{key.removesuffix(f'_{policy}')} {value:.2f}"
                for key, value in sample.items()
                if key.endswith(f"_{policy}")
            )
            lines += _quoted(f"{policy}: {scores}" if scores else policy, sample[policy])
    return "\n".join(lines) + "\n"


def tables(report: Mapping[str, Any]) -> list[Table]:
    """The report's figures as text, for the terminal and for report.md."""
    models = report["reward"]
    groups = dict.fromkeys(["all", *(rating for model in models.values() for rating in model["by_rating"])])
    accuracy = Table(
        "Reward models: accuracy on held-out pairs",
        ("pairs", *models),
        [(group, *(_interval(_accuracy(model, group)) for model in models.values())) for group in groups],
    )
    metrics = {policy: dict(flat(report["ppo"]["held_out"][policy])) for policy in POLICIES}
    names = dict.fromkeys(name for policy in POLICIES for name in metrics[policy])
    answers = Table(
        f"Policies: rewards and other figures of the answers to {metrics['ppo']['length']['n']} held-out prompts",
        ("figure", *POLICIES),
        [
            (name.removeprefix("reward."), *(_interval(metrics[policy].get(name)) for policy in POLICIES))
            for name in names
        ],
    )
    stages = Table(
        "Stages",
        ("stage", "seconds", "artifact"),
        [
            (stage, f"{report['seconds'][stage]:.0f}" if stage in report["seconds"] else "–", str(path))
            for stage, path in report["artifacts"].items()
        ],
    )
    return [accuracy, answers, *_profile(report["ppo"]), stages]


def flat(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """{"reward": {"safety": estimate}, "gold": estimate} -> ("reward.safety", estimate), ("gold", estimate)."""
    for name, value in metrics.items():
        if "value" not in value:
            yield from flat(value, f"{prefix}{name}.")
        elif value["value"] is not None:  # it was finite
            yield f"{prefix}{name}", value


def _stages(reward_models: Sequence[str]) -> list[str]:
    return ["sft", *(f"reward/{name}" for name in reward_models), "ppo"]


def _nested(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """{"reward.safety": estimate} -> {"reward": {"safety": estimate}}."""
    nested: dict[str, Any] = {}
    for name, estimate in metrics.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = estimate
        else:
            nested[first] = estimate
    return nested


def _drawings(report: Mapping[str, Any]) -> dict[str, Callable[[], bytes]]:
    policies = {policy: dict(flat(report["ppo"]["held_out"][policy])) for policy in POLICIES}
    return {
        "reward_accuracy": lambda: plots.reward_accuracy(report["reward"]),
        "held_out": lambda: plots.held_out(policies),
    }


def _facts(report: Mapping[str, Any]) -> list[str]:
    loss, ppo, mlflow = report["sft"]["held_out_loss"], report["ppo"], report["mlflow"]
    kept = f"{ppo['iterations']} iterations, number {ppo['best_iteration']} kept"
    where = f"{mlflow['tracking_uri']}, run {mlflow['run_id']}" if mlflow["run_id"] else "not recorded there"
    gains = (f"{name.removeprefix('reward.')} {_interval(gain)}" for name, gain in flat(ppo["gain"]))
    return [
        f"SFT: held-out loss {_number(loss)} nats per answer token",
        f"PPO: {kept}; KL to the SFT model {_number(ppo['kl'])} nats per answer",
        f"PPO less SFT, prompt by prompt: {', '.join(gains)}",
        f"MLflow: {where}",
    ]


def _warnings(report: Mapping[str, Any]) -> list[str]:
    """The alarms that sounded in PPO."""
    return [
        f"PPO, {alarms.line(entry)} (in {entry['iterations']} of {report['ppo']['iterations']} iterations)"
        for entry in report["ppo"].get("alarms", [])
    ]


def _profile(ppo: Mapping[str, Any]) -> list[Table]:
    """Where the time and the tokens of PPO went; nothing where no iteration was recorded."""
    if not (account := ppo.get("profile")):
        return []
    machine = account["machine"]
    at_best = f"{machine['flops'] / 1e9:.0f} GFLOP/s, {machine['bandwidth'] / 1e9:.0f} GB/s"
    return [
        Table(
            f"PPO: a mean iteration; the machine's limit: {at_best}", profile_table.COLUMNS, profile_table.rows(account)
        )
    ]


def _accuracy(model: Mapping[str, Any], group: str) -> Mapping[str, Any] | None:
    return model["accuracy"] if group == "all" else model["by_rating"].get(group)


def _interval(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "–"
    return f"{_number(estimate['value'])} [{_number(estimate['low'])}, {_number(estimate['high'])}]"


def _number(value: float | None) -> str:
    """Short enough for four columns on a terminal; report.json has all digits. A dash for what was not finite."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def _quoted(label: str, text: str) -> list[str]:
    """A label and a text that no Markdown in it can break out of."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"**{label}**", "", f"{fence}text", text, fence, ""]

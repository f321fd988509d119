"""A run as the comparison sees it: settings, data, results, curves, and values by held-out prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import UserError
from rlhf.evaluation import held_out
from rlhf.tracking import recorded, recorded_runs

CURVES = (
    "sft/loss",
    "sft/held_out_loss",
    "reward/loss",
    "reward/held_out_accuracy",
    "dpo/loss",
    "dpo/held_out_loss",
    "dpo/held_out_accuracy",
    "ppo/reward",
    "eval/reward",
    "ppo/kl",
    "eval/kl",
    "eval/gold",
)
REPORT = "report.json"
Points = list[tuple[int, float]]
Result = Mapping[str, Any]
"""An estimate, or a `value` alone."""


@dataclass(frozen=True)
class RunRecord:
    name: str
    place: str
    settings: Mapping[str, str]  # dotted name → JSON text
    data: Mapping[str, str]  # "role: file" → digest
    report: Mapping[str, Any]  # report.json; empty where the run did not finish
    curves: Mapping[str, Points]  # "ppo/reward", "reward/held_out_accuracy (safety)"
    rows: Mapping[str, Sequence[held_out.Row]]  # part → held_out.jsonl

    @property
    def seed(self) -> int:
        return int(self.settings.get("seed", 0))


def from_folders(paths: Sequence[Path]) -> list[RunRecord]:
    """UserError (4) for what is no folder of a run."""
    for path in paths:
        if not recorded.is_run(path):
            raise UserError(
                f"{path} is no folder of a run; give runs/NAME, or --tracking-uri URI for runs in MLflow", 4
            )
    return [_from_folder(name, path) for name, path in zip(_names(paths), paths, strict=True)]


def from_mlflow(uri: str, experiment: str, names: Sequence[str]) -> list[RunRecord]:
    """UserError (4) for a run that is not in this store, (6) where the store cannot be read."""
    found = recorded_runs(uri, experiment, names, CURVES, held_out.FILE, REPORT)
    return [
        RunRecord(
            name=run.name,
            place=f"MLflow run {run.run_id}",
            settings=run.params,
            data=run.data,
            report=json.loads(run.file or "{}"),
            curves=_named({part: own.metrics for part, own in run.parts.items()}),
            rows={part: held_out.parse(own.file) for part, own in run.parts.items() if own.file},
        )
        for run in found
    ]


def _from_folder(name: str, path: Path) -> RunRecord:
    parts = recorded.parts_in(path)
    report = path / REPORT
    return RunRecord(
        name=name,
        place=str(path),
        settings=recorded.params_in(path),
        data=recorded.data_in(path),
        report=json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {},
        curves=_named({part: recorded.metrics_in(path / part, CURVES) for part in parts}),
        rows={part: rows for part in parts if (rows := held_out.read(path / part / "artifact" / held_out.FILE))},
    )


def _named(metrics: Mapping[str, Mapping[str, Points]]) -> dict[str, Points]:
    """The curves of all parts; those of one of several parts of a stage with its name."""
    named = {}
    for part, own in metrics.items():
        _, _, name = part.partition("/")
        named |= {f"{metric} ({name})" if name else metric: points for metric, points in own.items()}
    return named


def _names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path; as much of it as tells them apart."""
    whole = [path.absolute().parts for path in paths]
    for count in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len({*names}) == len(names):
            return names
    raise UserError(f"a run is named twice: {', '.join(map(str, paths))}")

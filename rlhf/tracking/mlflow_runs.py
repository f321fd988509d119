"""Reads runs back from MLflow: a pipeline's run, and the runs of its stages below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rlhf.errors import UserError
from rlhf.tracking.base import PROVENANCE
from rlhf.tracking.mlflow_client import PARENT, open_store, public_uri

MAX_RUNS = 1000


@dataclass(frozen=True)
class RecordedPart:
    metrics: dict[str, list[tuple[int, float]]]
    file: str | None


@dataclass(frozen=True)
class RecordedRun:
    name: str
    run_id: str
    params: dict[str, str]
    data: dict[str, str]  # `role: name` → digest
    parts: dict[str, RecordedPart]
    file: str | None


def recorded_runs(
    uri: str, experiment: str, names: Sequence[str], metrics: Sequence[str], part_file: str, file: str
) -> list[RecordedRun]:
    """The newest run of each of `names` (a name or an id), with these metrics and the text of these artifacts.

    UserError (4) for a run that is not there, (6) where the store cannot be read.
    """
    try:
        return [_read(mlflow, run, metrics, part_file, file) for mlflow, run in _find(uri, experiment, names)]
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever MLflow and its store raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--tracking-uri: MLflow at {public_uri(uri)} cannot be read: {reason}", 6) from None


def _find(uri: str, experiment: str, names: Sequence[str]) -> list[tuple[Any, Any]]:
    mlflow = open_store(uri, "--tracking-uri")
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        raise UserError(
            f"--tracking-uri: {public_uri(uri)} has no experiment {experiment!r}; --experiment names another", 4
        )
    runs = mlflow.search_runs([found.experiment_id], max_results=MAX_RUNS, order_by=["attributes.start_time DESC"])
    parents = [run for run in runs if PROVENANCE in run.data.tags or PARENT not in run.data.tags]  # cells of sweeps too
    chosen = []
    for name in names:
        match = next((run for run in parents if name in (run.info.run_name, run.info.run_id)), None)
        if match is None:
            known = ", ".join(dict.fromkeys(str(run.info.run_name) for run in parents)) or "none"
            raise UserError(f"--tracking-uri: {public_uri(uri)} has no run {name!r}; it has {known}", 4)
        chosen.append((mlflow, match))
    if len({run.info.run_id for _, run in chosen}) < len(chosen):
        raise UserError(f"a run is named twice: {', '.join(names)}")
    return chosen


def _read(mlflow: Any, run: Any, metrics: Sequence[str], part_file: str, file: str) -> RecordedRun:
    nested = mlflow.search_runs(
        [run.info.experiment_id], f"tags.`{PARENT}` = '{run.info.run_id}'", order_by=["attributes.start_time ASC"]
    )
    parts = {
        str(part.info.run_name): RecordedPart(_curves(mlflow, part, metrics), _text(mlflow, part, part_file))
        for part in nested
    }
    data = {}
    for entry in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in entry.tags}
        digest = tags.get("sha256", entry.dataset.digest)
        data[f"{tags.get('mlflow.data.context', 'data')}: {entry.dataset.name}"] = digest
    params = dict(run.data.params)
    return RecordedRun(str(run.info.run_name), run.info.run_id, params, data, parts, _text(mlflow, run, file))


def _curves(mlflow: Any, run: Any, names: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """By step; of a step that was recorded twice, the later value."""
    curves = {}
    for name in names:
        if name in run.data.metrics:
            history = sorted(mlflow.get_metric_history(run.info.run_id, name), key=lambda point: point.timestamp)
            curves[name] = sorted({point.step: point.value for point in history}.items())
    return curves


def _text(mlflow: Any, run: Any, name: str) -> str | None:
    """An artifact of the run; None where it has none of that name."""
    if name not in {entry.path for entry in mlflow.list_artifacts(run.info.run_id)}:
        return None
    with TemporaryDirectory() as folder:
        return Path(mlflow.download_artifacts(run.info.run_id, name, folder)).read_text(encoding="utf-8")

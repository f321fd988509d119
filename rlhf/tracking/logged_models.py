"""Artifacts as MLflow's LoggedModels: ranked by `search_logged_models` and in the UI. The weights stay where they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.tracking.registry import registered_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

BEFORE_TRAINING = 0  # the step at which a stage measures what it starts from
MAX_DIGEST = 36  # MLflow's limit for that of a dataset, characters


def send_model(client: MlflowClient, run_id: str, event: Mapping[str, Any]) -> str:
    """Logs the artifact of a run, with its metrics on the dataset that they were measured on; once per digest. Its id.

    `event`: `name`, `kind` (MLflow's model_type), `path`, `digest`, `metrics`, `step`, `dataset` {`name`, `digest`}.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput

    model_id = _model_id(client, run_id, event)
    name, digest = _dataset(event)
    dataset = Dataset(name, digest, "local", json.dumps({"uri": name}))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])
    outputs = client.get_run(run_id).outputs
    if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:  # refused twice
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=event["step"])])
    _log(client, run_id, model_id, event, event["metrics"])
    return model_id


def send_measured(client: MlflowClient, run_id: str, event: Mapping[str, Any]) -> None:
    """Gives models of earlier stages what this stage measured on them, so that they rank beside its own.

    `event`: as above, and `measured`: [{`digest`, `metrics`}]. A model that this store does not have is left out.
    """
    experiment = client.get_run(run_id).info.experiment_id
    for one in event.get("measured", ()):
        same = f"tags.`artifact.digest` = '{one['digest']}'"
        for model in client.search_logged_models([experiment], filter_string=same):
            _log(
                client,
                model.source_run_id or run_id,
                model.model_id,
                {**event, "step": BEFORE_TRAINING},
                one["metrics"],
            )


def _log(
    client: MlflowClient, run_id: str, model_id: str, event: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    from mlflow.entities import Metric

    name, digest = _dataset(event)
    where: dict[str, Any] = {"dataset_name": name, "dataset_digest": digest, "model_id": model_id, "run_id": run_id}
    when = int(1000 * event["time"])
    client.log_batch(run_id, [Metric(key, value, when, event["step"], **where) for key, value in metrics.items()])


def _dataset(event: Mapping[str, Any]) -> tuple[str, str]:
    return event["dataset"]["name"], event["dataset"]["digest"][:MAX_DIGEST]


def _model_id(client: MlflowClient, run_id: str, event: Mapping[str, Any]) -> str:
    """Of the model that an interrupted upload made already, or of a new one."""
    experiment = client.get_run(run_id).info.experiment_id
    same = f"source_run_id = '{run_id}' AND tags.`artifact.digest` = '{event['digest']}'"
    if found := client.search_logged_models([experiment], filter_string=same):
        return found[0].model_id
    tags = {"mlflow.model.isExternal": "true", "artifact.path": event["path"], "artifact.digest": event["digest"]}
    made = client.create_logged_model(
        experiment, registered_name(event["name"]), run_id, tags, model_type=event["kind"]
    )
    client.finalize_logged_model(made.model_id, "READY")
    return made.model_id

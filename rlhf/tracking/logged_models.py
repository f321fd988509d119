"""Artifacts as MLflow's LoggedModels: ranked by `search_logged_models` and in the UI. The weights stay where they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.tracking.registry import registered_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_DIGEST = 36  # MLflow's limit for that of a dataset, characters


def send_model(client: MlflowClient, run_id: str, event: Mapping[str, Any]) -> str:
    """Logs the artifact of a run, with its metrics on the dataset that they were measured on; once per digest. Its id.

    `event`: `name`, `kind` (MLflow's model_type), `path`, `digest`, `metrics`, `step`, `dataset` {`name`, `digest`}.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric

    model_id = _model_id(client, run_id, event)
    name, digest = event["dataset"]["name"], event["dataset"]["digest"][:MAX_DIGEST]
    dataset = Dataset(name, digest, "local", json.dumps({"uri": name}))
    client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])])
    outputs = client.get_run(run_id).outputs
    if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:  # refused twice
        client.log_outputs(run_id, [LoggedModelOutput(model_id, step=event["step"])])
    where: dict[str, Any] = {"dataset_name": name, "dataset_digest": digest, "model_id": model_id, "run_id": run_id}
    when = int(1000 * event["time"])
    client.log_batch(
        run_id, [Metric(key, value, when, event["step"], **where) for key, value in event["metrics"].items()]
    )
    return model_id


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

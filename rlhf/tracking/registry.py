"""Artifacts as versions in MLflow's model registry: parents, data and metrics are tags, the weights stay where they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
DIGEST, PATH = "artifact.digest", "artifact.path"


def send_version(client: MlflowClient, run_id: str, model_id: str, event: Mapping[str, Any]) -> None:
    """Registers the artifact of a run as a version, once per run and digest; the newest version is the candidate.

    `event`: `path`, `digest`, `metrics` and `registered` {`name`, `description`, `tags`, `inputs`: name → digest}.
    """
    registered, name = event["registered"], registered_name(event["registered"]["name"])
    _make_model(client, name)
    same = f"name = '{name}' and run_id = '{run_id}' and tags.`{DIGEST}` = '{event['digest']}'"
    if not client.search_model_versions(same):
        made = client.create_model_version(
            name,
            _source(client, model_id, event["path"]),
            run_id,
            tags=_tags(client, event) | {"logged_model": model_id},
            description=registered["description"],
            model_id=model_id,
        )
        versions = json.dumps([{"name": name, "version": int(made.version)}])
        client.set_logged_model_tags(model_id, {"mlflow.modelVersions": versions})  # as a server does: the UI links it
    newest = client.search_model_versions(f"name = '{name}'", 1, ["version_number DESC"])[0]
    client.set_registered_model_alias(name, CANDIDATE, str(newest.version))


def registered_name(text: str) -> str:
    """`text` without what MLflow forbids in the name of a model."""
    return re.sub(r"[/:.%\"']", "-", text)


def _make_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # it exists; what else is wrong the next call finds too
        client.create_registered_model(name)


def _source(client: MlflowClient, model_id: str, path: str) -> str:
    """A server refuses paths of this machine, and takes the LoggedModel; a database takes the path only."""
    return f"models:/{model_id}" if client.tracking_uri.startswith("http") else path


def _tags(client: MlflowClient, event: Mapping[str, Any]) -> dict[str, str]:
    registered = event["registered"]
    inputs = {f"input.{name}": _reference(client, digest) for name, digest in registered["inputs"].items()}
    metrics = {name: f"{value:.6g}" for name, value in event["metrics"].items()}
    tags = {PATH: event["path"], DIGEST: event["digest"], **registered["tags"], **inputs, **metrics}
    return {re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII): value for key, value in tags.items()}


def _reference(client: MlflowClient, digest: str) -> str:
    """Of the newest version with this artifact, with its digest; the digest alone if none is registered."""
    found = client.search_model_versions(f"tags.`{DIGEST}` = '{digest}'", 1, ["last_updated_timestamp DESC"])
    return f"models:/{found[0].name}/{found[0].version} {digest}" if found else digest

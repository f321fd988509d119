"""What MLflow is told of a stage's artifact: its metrics on held-out data, by which models are ranked, and its origin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf.config import RunConfig
from rlhf.data import parsed
from rlhf.runs import provenance
from rlhf.runs.artifacts import Artifact, sha256_of
from stages.base import stage_of


def describe(config: RunConfig, artifact: Artifact) -> dict[str, Any]:
    stage = stage_of(artifact.kind)
    file = parsed.held_out_file(config, stage.roles[0])
    of_policy = artifact.metrics.get("held_out", {}).get(artifact.kind)  # base and SFT model were measured beside it
    return {
        "name": f"{config.name}-{artifact.kind}",
        "kind": "reward_model" if stage.name == "reward" else "policy",
        "path": str(artifact.path),
        "digest": artifact.digest,
        "metrics": dict(held_out(of_policy or artifact.metrics)),
        "step": artifact.metrics.get("best_iteration", artifact.metrics.get("steps", 0)),
        "dataset": {"name": f"{stage.roles[0]}, held out", "digest": sha256_of(file)},
        "registered": _registered(config, artifact),
        "measured": _measured(artifact),
    }


def _measured(artifact: Artifact) -> list[dict[str, Any]]:
    """The metrics of artifacts that this one started from, which were measured on the same prompts."""
    found = artifact.metrics.get("held_out", {})
    return [
        {"digest": digest, "metrics": dict(held_out(found[name]))}
        for name, digest in provenance.inputs_of(artifact.parents).items()
        if name in found
    ]


def _registered(config: RunConfig, artifact: Artifact) -> dict[str, Any]:
    """The version of the registry. Versions of one name can take each other's place: all policies of an experiment, of
    whatever run and algorithm, and its reward models of one name."""
    stage = stage_of(artifact.kind).name
    family = artifact.kind.replace("/", "-") if stage in ("sft", "reward") else "policy"
    inputs = provenance.inputs_of(artifact.parents)
    data = {f"data.{name}": digest for name, digest in artifact.parents.items() if name not in inputs}
    return {
        "name": f"{config.tracking.experiment}-{family}",
        "description": f"{artifact.kind} of run {config.name}",
        "inputs": inputs,
        "tags": {
            "run": config.name,
            "artifact.kind": artifact.kind,
            "config.digest": artifact.config_digest,
            "git.revision": artifact.code_revision,
            **data,
        },
    }


def held_out(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """{"accuracy": {"value": .7, …}, "by_tag": {"safety": estimate}, "held_out_loss": 2.0}
    → held_out/accuracy, held_out/by_tag_safety, held_out/loss. Figures that are no estimates are left out."""
    for key, value in metrics.items():
        if isinstance(value, Mapping) and "value" not in value:
            yield from held_out(value, f"{prefix}{key}_")
        elif isinstance(value, Mapping) and value["value"] is not None:
            yield f"held_out/{prefix}{key.replace('.', '_')}", value["value"]
        elif key.startswith("held_out_") and isinstance(value, int | float):
            yield f"held_out/{key.removeprefix('held_out_')}", value

"""The base model of a run where it comes from the hub: the driver says once which commit it is, and every node has it
before its workers form a group, whose collectives would not wait for a download."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf import hub
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim
from rlhf.runs.artifacts import write_json
from rlhf.runs.context import Progress

RECORD = "base_model.json"
POLL_S = 5.0


def with_commit(config: RunConfig, folder: Path | None = None) -> RunConfig:
    """`config` with the commit of a hub model in `model.path`: that with which the run began, which keeps its stages
    complete when the hub has a newer one. It is recorded in `folder`, by default the run's."""
    name, folder = config.model.path, folder or config.folder
    if not hub.is_of_hub(name):
        return config
    record, known = folder / RECORD, recorded(folder)
    if name not in known:
        known[name] = hub.pinned(name)
        if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
            record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_json(record, known)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": known[name]})})


def recorded(folder: Path) -> dict[str, str]:
    """Hub names, and the same with the commit with which the run in `folder` began."""
    record = folder / RECORD
    return json.loads(record.read_text()) if record.exists() else {}


def fetch_here(config: RunConfig) -> None:
    """Lets this machine have the model, and the base of an adapter. Processes of one machine wait for each other."""
    if config.model.path != "tiny":
        _fetch(config.model.path)


def _fetch(name: str) -> None:
    from rlhf.models.folders import adapter_base, find_model, is_adapter

    folder = find_model(name)
    while is_adapter(folder):
        folder = adapter_base(folder)


def may_be_downloaded(config: RunConfig) -> bool:
    """An adapter's base may be of the hub too."""
    name = config.model.path
    return hub.is_of_hub(name) or (Path(name).expanduser() / "adapter_config.json").is_file()


def fetch_on_nodes(config: RunConfig, stage: str, secrets: Mapping[str, str]) -> None:
    """Lets every node have the model on which workers may be placed, side by side, each node once. Takes as long as
    they download. UserError where one of them cannot have it."""
    if not may_be_downloaded(config):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode

    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if _takes_workers(config, node)}
    progress = Progress(config.folder / stage, is_writer=True)
    progress.warn(f"waiting for the base model {config.model.path} on {', '.join(nodes.values())}")
    progress.update(0, 1)
    started = {}
    for node, name in nodes.items():
        task = ray.remote(_try_to_fetch).options(num_cpus=0, scheduling_strategy=OnNode(node, soft=False))
        started[task.remote(config.model.path, dict(secrets))] = name
    waiting = list(started)
    while waiting:
        claim.require()
        done, waiting = ray.wait(waiting, timeout=POLL_S)
        for one in done:
            if failure := ray.get(one):
                raise UserError(f"{started[one]}: {failure[0]}", failure[1])


def _takes_workers(config: RunConfig, node: Mapping[str, Any]) -> bool:
    wanted = {"CPU": config.hardware.cpus_per_worker, "GPU": config.hardware.gpus_per_worker}
    return node["Alive"] and all(node["Resources"].get(kind, 0) >= amount for kind, amount in wanted.items())


def _try_to_fetch(name: str, secrets: dict[str, str]) -> tuple[str, int] | None:
    """Message and exit code of what went wrong, which Ray would wrap in a page."""
    os.environ.update(secrets)
    try:
        _fetch(name)
    except UserError as error:
        return error.message, error.exit_code
    return None

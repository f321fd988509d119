"""What an artifact was made from, back to the data, from manifests and the settings beside them alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import DataConfig
from rlhf.data.loading import digest_now, source_name
from rlhf.errors import UserError
from rlhf.runs import artifacts, provenance


@dataclass
class Node:
    name: str  # "ppo", "reward/helpfulness", "prompts: shipped:train", "model"
    digest: str  # as recorded; "" for a model without one
    path: Path | None = None
    facts: dict[str, str] = field(default_factory=dict)  # settings, revision
    fault: str = ""  # what is missing or changed
    parents: list[Node] = field(default_factory=list)

    def faults(self) -> Iterator[str]:
        """Of this and everything that it was made from, each once."""
        yield from dict.fromkeys(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.fault:
            yield f"{self.name}: {self.fault}"
        for parent in self.parents:
            yield from parent._faults()


def trace(folder: Path) -> Node:
    """The tree of the artifact in `folder`. UserError (4) if there is none."""
    artifact = artifacts.load(folder, sizes=False)
    return _traced(artifact, artifact.digest, {})


def _traced(artifact: artifacts.Artifact, digest: str, known: dict[tuple[str, str], Node]) -> Node:
    """`known`: the nodes that other branches have found, by name and recorded digest."""
    stage = artifact.path.absolute().parent
    run = stage.parents[artifact.kind.count("/")]
    settings = _settings(stage)
    node = Node(artifact.kind, digest, artifact.path, {"revision": artifact.code_revision}, _damage(artifact))
    note = "" if _belong(stage, artifact) else "not the ones beside it"
    node.facts["settings"] = " ".join(filter(None, (artifact.config_digest[:12], note or str(stage / "config.yaml"))))
    inputs = provenance.inputs_of(artifact.parents)
    for name, recorded in artifact.parents.items():
        if (name, recorded) not in known:
            known[name, recorded] = (
                _input(run, name, recorded, known) if name in inputs else _source(name, recorded, settings)
            )
        node.parents.append(known[name, recorded])
    if not inputs and settings:
        node.parents.append(_base_model(settings["model"]["path"]))
    return node


def _input(run: Path, name: str, recorded: str, known: dict[tuple[str, str], Node]) -> Node:
    folder = run / name / "artifact"
    try:
        artifact = artifacts.load(folder, sizes=False)
    except UserError:
        return Node(name, recorded, folder, fault=f"missing: {folder} holds no complete artifact")
    if artifact.digest != recorded:
        return Node(name, recorded, folder, fault=f"changed: {folder} now holds {artifact.digest[:12]}")
    return _traced(artifact, recorded, known)


def _source(name: str, recorded: str, settings: Mapping[str, Any] | None) -> Node:
    role, _, source = name.partition(": ")
    node = Node(name, recorded)
    if settings is None or source.startswith("held out in "):  # rows left out, which no file holds
        return node
    data = DataConfig.model_validate(settings["data"])
    of_role = getattr(data, role)
    named = {source_name(one): one for one in (*of_role.train, *of_role.held_out)} if of_role else {}
    if source not in named:
        return node
    try:
        now = digest_now(role, named[source], data)
    except UserError as error:
        node.fault = f"missing: {error.message}"
    else:
        node.fault = f"changed: its digest is {now[:12]} now" if now not in (None, recorded) else ""
    return node


def _base_model(path: str) -> Node:
    gone = Path(path).is_absolute() and not Path(path).exists()
    return Node(f"model: {path}", "", fault=f"missing: {path} does not exist" if gone else "")


def _damage(artifact: artifacts.Artifact) -> str:
    try:
        artifacts.load(artifact.path, verify=True)
    except UserError as error:
        return error.message
    return ""


def _settings(stage: Path) -> dict[str, Any] | None:
    try:
        return yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _belong(stage: Path, artifact: artifacts.Artifact) -> bool:
    """Whether the settings beside an artifact are those of the attempt that made it."""
    try:
        made_by = json.loads((stage / "made_by.json").read_text())
    except FileNotFoundError:
        return False
    return made_by["from"] == artifacts.digest_of([artifact.config_digest, artifact.parents])

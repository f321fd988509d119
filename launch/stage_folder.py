"""The folder of a stage in a run: whether it is complete, how an attempt begins, and why one failed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from launch import aside
from launch.worker import FAILURE
from rlhf.config import RunConfig
from rlhf.data import Split
from rlhf.errors import UserError
from rlhf.runs import artifacts, provenance
from rlhf.runs.artifacts import Artifact
from rlhf.tracking import EVENTS, METRICS, mark_ended, status_of
from stages.base import stage_of

Data = Mapping[str, Split]
"""Role → rows, of every role of the run."""

MADE_BY = "made_by.json"  # beside a stage's checkpoints: what they were made with
SHARED = (METRICS, EVENTS, "config.yaml")  # what goes with an artifact that two runs share


def complete_artifact(config: RunConfig, stage: str, data: Data) -> Artifact | None:
    """The stage's artifact, if it is whole and was made from today's settings, data and parents."""
    inputs = {name: complete_artifact(config, name, data) for name in stage_of(stage).inputs(config)}
    if None in inputs.values():
        return None
    parents = _parents(stage, data, inputs)  # type: ignore[arg-type]
    return artifacts.find(config.folder / stage / "artifact", _digest(config, stage), parents)


def recipe(config: RunConfig, stage: str, data: Data) -> str:
    """A digest of the settings and data of a stage and of all stages before it. Stages with one recipe make the same."""
    inputs = {name: recipe(config, name, data) for name in stage_of(stage).inputs(config)}
    return artifacts.digest_of([stage, _digest(config, stage), _parents(stage, data, {}), inputs])


def prepare(config: RunConfig, stage: str, data: Data) -> None:
    """Clears what an earlier attempt left behind; its checkpoints stay if it started from the same. Any
    number of workers can go on from them."""
    folder = config.folder / stage
    made_by = folder / MADE_BY
    inputs = {name: artifacts.load(config.folder / name / "artifact") for name in stage_of(stage).inputs(config)}
    parents = _parents(stage, data, inputs)
    attempt = {"from": artifacts.digest_of([_digest(config, stage), parents]), "code": artifacts.code_revision()}
    known = json.loads(made_by.read_text()) if made_by.exists() else {}
    if known.get("from") != attempt["from"]:
        aside.put(config, stage, _digest(config, stage), parents)
    elif any((folder / "checkpoints").glob("*")):
        aside.say_revision(stage, "its checkpoints were", known.get("code"))
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(made_by, attempt)
    for stale in (FAILURE, "progress.json"):
        (folder / stale).unlink(missing_ok=True)


def share(config: RunConfig, stage: str, data: Data, made: Path) -> None:
    """Puts what another run of the same recipe made in its folder `made` into this run: weights as hard links."""
    prepare(config, stage, data)
    folder = config.folder / stage
    partial = folder / "artifact.partial"
    for old in (partial, folder / "artifact"):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    artifacts.link_tree(made / "artifact", partial)
    for name in SHARED:  # copies: a stage that runs here again would write into a link
        if (made / name).exists():
            shutil.copy2(made / name, folder / name)
    partial.rename(folder / "artifact")


def failure_of(config: RunConfig, stage: str, error: Exception) -> UserError:
    """What people are told of a worker group that ended with `error`."""
    folder = config.folder / stage
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    failure = error if isinstance(error, UserError) else UserError(f"a worker died: {last[0][:300]}", 6)
    mark_ended(folder, status_of(failure), failure.message)
    if failure.is_stop:
        return UserError(f"{stage}: {failure.message}", failure.exit_code)
    return UserError(
        f"{stage} failed: {failure.message}\nThe logs of its workers are in {folder / 'logs'}", failure.exit_code
    )


def _parents(stage: str, data: Data, inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return provenance.parents({role: data[role] for role in stage_of(stage).roles}, inputs)


def _digest(config: RunConfig, stage: str) -> str:
    return provenance.settings_digest(config, stage, stage_of(stage).roles)

"""Which reward models score what a served model says: those that are named, else those of the run that made it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from launch.evaluate.policy.rewards import named
from launch.model_folder import model_folder
from launch.promote.plan import rewards_of, settings_of
from rlhf.errors import UserError
from rlhf.runs import artifacts


def reward_folders(given: Sequence[str], policy: Path) -> dict[str, Path]:
    """By name. UserError (2, 4) for a reward that is given and is none."""
    if given == ["none"]:
        return {}
    return {name: model_folder(folder) for name, folder in named(given).items()} if given else of_run(policy)


def of_run(policy: Path) -> dict[str, Path]:
    """The reward models from which this policy was made, where they are still there; functions are none."""
    file = policy / artifacts.MANIFEST
    if not file.is_file():
        return {}
    manifest = json.loads(file.read_text())
    try:
        rewards = rewards_of(settings_of(policy, manifest["kind"]))
    except (UserError, ValidationError):  # the artifact was copied without its run, or is of another version
        return {}
    found = {}
    for name, folder in rewards.items():
        other = Path(folder) / artifacts.MANIFEST
        if other.is_file():
            own = json.loads(other.read_text())
            if manifest["parents"].get(own["kind"], own["digest"]) == own["digest"]:
                found[name] = Path(folder)
    return found

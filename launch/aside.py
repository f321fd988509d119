"""What an earlier run left behind that does not fit today's settings, data or code: it is set aside or said, not deleted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from launch.terminal import console
from rlhf.config import RunConfig
from rlhf.runs.artifacts import MANIFEST, code_revision
from rlhf.tracking import keep_earlier


def put(config: RunConfig, stage: str, config_digest: str, parents: Mapping[str, str]) -> None:
    """Clears the folder of a stage that starts from other things now. A finished one moves to `earlier/<number>/`; of an
    unfinished one only its metrics do."""
    folder, manifest = config.folder / stage, config.folder / stage / "artifact" / MANIFEST
    made_from = json.loads(manifest.read_text()) if manifest.exists() else None
    keep_earlier(config.folder, config.tracking, stage)
    if made_from is not None:
        place = _free_place(config, stage)
        place.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.rename(place / path.name)
        why = ", ".join(_changes(made_from, config_digest, parents))
        _say(f"{stage}: made from other things than today ({why}); the finished one is set aside in {place}")
    shutil.rmtree(folder, ignore_errors=True)


def _free_place(config: RunConfig, stage: str) -> Path:
    """Beside the metrics that were kept last."""
    number = max((int(path.name) for path in (config.folder / "earlier").glob("[0-9]*")), default=1)
    while (place := config.folder / "earlier" / str(number) / stage / "artifact").exists():
        number += 1
    return place.parent


def say_revision(stage: str, what: str, revision: str | None) -> None:
    """Says when something was made by other code than today's. That alone makes nothing stale."""
    if revision is not None and revision != (now := code_revision()):
        _say(f"{stage}: {what} made by code revision {revision}, which is {now} now")


def _changes(manifest: Mapping, config_digest: str, parents: Mapping[str, str]) -> list[str]:
    earlier = manifest["parents"]
    names = [name for name in {**earlier, **parents} if earlier.get(name) != parents.get(name)]
    return ["settings"] * (manifest["config_digest"] != config_digest) + names


def _say(text: str) -> None:
    console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

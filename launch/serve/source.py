"""What is served: a folder, and where in the registry it comes from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

from launch.model_folder import model_folder
from rlhf.errors import UserError
from rlhf.runs import artifacts

ALIAS = re.compile(r"[^/@\s]+@[\w-]+")


class Source(NamedTuple):
    folder: Path
    version: str | None = None
    """models:/NAME/3, of a model in the registry."""
    alias: str | None = None
    """models:/NAME@ALIAS, where the model was named by one."""


def resolved(model: str, uri: str | None) -> Source:
    """A folder, NAME@ALIAS of the registry, or a hub name. UserError (4)."""
    reference = f"models:/{model}" if ALIAS.fullmatch(model) and not Path(model).exists() else model
    if not reference.startswith("models:/"):
        return Source(model_folder(model))
    if uri is None:
        raise UserError(f"{model}: --tracking-uri is null, and the registry is there")
    from rlhf.tracking.versions import Registry

    version = Registry(uri).version(reference)
    return Source(model_folder(str(version.path)), version.uri, reference if "@" in reference else None)


def digest_of(folder: Path) -> str | None:
    """Of the artifact in this folder, if it is one."""
    manifest = folder / artifacts.MANIFEST
    return json.loads(manifest.read_text())["digest"] if manifest.is_file() else None

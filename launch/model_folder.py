"""The model that a folder of a run refers to."""

from __future__ import annotations

from pathlib import Path

from rlhf.models import find_model
from rlhf.runs import artifacts


def model_folder(name: str) -> Path:
    """A model folder, a stage's folder with its artifact in it, or a hub name.

    UserError (4) where there is none, or where the artifact is unfinished or damaged.
    """
    folder = Path(name).expanduser()
    if (folder / "artifact").is_dir():
        folder = folder / "artifact"
        artifacts.load(folder)
    elif (folder / artifacts.MANIFEST).is_file():
        artifacts.load(folder)
    return find_model(folder if folder.is_dir() else name)

"""Which arguments are models and which are data, and what they are called in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.model_folder import model_folder
from reward_data.files import is_data
from reward_data.stream import files_of
from rlhf.errors import UserError
from rlhf.runs.artifacts import MANIFEST, digest_of, load, sha256_of

MODEL_FILES = ("config.json", "adapter_config.json", MANIFEST)


@dataclass(frozen=True)
class Inputs:
    models: dict[str, Path]  # name in the report → folder
    files: list[Path]

    def digest(self) -> str:
        """Of the content of all models and files."""
        return digest_of(
            {
                "models": {name: model_digest(folder) for name, folder in self.models.items()},
                "files": [[str(file), content_digest(file)] for file in self.files],
            }
        )


def sort_inputs(arguments: Sequence[str]) -> Inputs:
    """UserError (2) without a model or data, (4) for a model that is not there; DataError for data that is not there."""
    data = [argument for argument in arguments if _is_data(argument)]
    models = [argument for argument in arguments if argument not in data]
    if not models or not data:
        missing = (
            "model (a folder, or a name on the hub)" if not models else "data (a file, a folder of files, or shipped)"
        )
        raise UserError(f"no {missing} among {', '.join(arguments)}: rlhf evaluate reward MODEL… DATA… --out DIR")
    folders = {name: model_folder(model) for name, model in zip(model_names(models), models, strict=True)}
    return Inputs(folders, list(dict.fromkeys(file for path in data for file in files_of(path))))


def _is_data(argument: str) -> bool:
    path = Path(argument).expanduser()
    if path.is_dir():
        return not (path / "artifact").is_dir() and not any((path / name).is_file() for name in MODEL_FILES)
    return path.is_file() or argument == "shipped" or is_data(argument)


def model_names(models: Sequence[str]) -> list[str]:
    """The last part of each path that tells it from the others; the whole path where none does."""
    if len(set(models)) < len(models):
        raise UserError(f"a model is named twice: {', '.join(models)}")
    paths = [Path(model).parent if Path(model).name == "artifact" else Path(model) for model in models]
    for count in range(1, 4):
        names = ["/".join(path.parts[-count:]) or str(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(models)


def model_digest(folder: Path) -> str:
    if (folder / MANIFEST).is_file():
        return load(folder).digest
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return digest_of({path.name: sha256_of(path) for path in files})


def content_digest(file: Path) -> str:
    """SHA-256 of a file, or of the files of a saved data set."""
    parts = sorted(file.glob("*.arrow")) if file.is_dir() else [file]
    digests = [sha256_of(part) for part in parts]
    return digests[0] if len(digests) == 1 else digest_of(digests)

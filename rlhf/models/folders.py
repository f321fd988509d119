"""Where a model folder is and what it contains."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from rlhf import hub
from rlhf.errors import UserError

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def why(error: BaseException) -> str:
    """What to say about a model that transformers could not load."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is never run; use a model of a family that transformers has"
    return str(error)


def find_model(name: str | Path, weights: bool = True) -> Path:
    """The folder of a model, given as a folder or a hub name. UserError (4) if there is none, (8) if the hub cannot be
    reached.

    `weights` False: does not download the weights of a hub model.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or is_adapter(folder):
        return folder
    if folder.is_dir():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder.resolve()} is no model folder: it holds no config.json, but {inside}", 4)
    if folder.is_file():
        hint = "; `rlhf import-gguf` turns it into one" if folder.suffix == ".gguf" else ""
        raise UserError(f"{folder.resolve()} is a file, and a model is a folder{hint}", 4)
    if not hub.is_of_hub(str(name)):
        raise UserError(f"there is no model folder {folder.resolve()}", 4)
    return hub.folder(str(name), weights)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def adapter_base(folder: Path, weights: bool = True) -> Path:
    """The folder of a PEFT adapter's base model, at the revision that the adapter names."""
    file = folder / "adapter_config.json"
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}", 4) from error
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    if not base:
        raise UserError(f"{file} does not name its base_model_name_or_path", 4)
    try:
        return find_model(f"{base}@{revision}" if revision and hub.is_of_hub(base) else base, weights)
    except UserError as error:
        raise UserError(f"{file} names its base_model_name_or_path, but {error.message}", error.exit_code) from error


def has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))

"""Where a model folder is and what it contains."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError

from rlhf.errors import UserError

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
HUB_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]
WEIGHTS = ["*.safetensors"]


def why(error: BaseException) -> str:
    """What to say about a model that transformers could not load."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own, which is never run; use a model of a family that transformers has"
    return str(error)


def find_model(name: str | Path, weights: bool = True) -> Path:
    """The folder of a model, given as a folder or a hub name. UserError (4) if there is none.

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
    if str(name).count("/") > 1 or str(name).startswith((".", "/", "~")):
        raise UserError(f"there is no model folder {folder.resolve()}", 4)
    return _download(str(name), HUB_FILES + WEIGHTS if weights else HUB_FILES)


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"there is no model {name!r}: no folder {Path(name).resolve()}, and the hub gave none ({reason})", 4
        ) from error


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def adapter_base(folder: Path) -> Path:
    """The folder of a PEFT adapter's base model."""
    file = folder / "adapter_config.json"
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(f"cannot read {file}: {error}", 4) from error
    if not base:
        raise UserError(f"{file} does not name its base_model_name_or_path", 4)
    try:
        return find_model(base)
    except UserError as error:
        raise UserError(f"{file} names its base_model_name_or_path, but {error.message}", 4) from error


def has_tokenizer(folder: Path) -> bool:
    return any(folder.glob("tokenizer*"))

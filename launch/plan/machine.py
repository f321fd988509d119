"""The machine of a plan."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from rlhf.config import HardwareConfig
from rlhf.planning import Machine, machine_named

DEFAULT = "h100-80g"


def machine_for(hardware: HardwareConfig, name: str | None) -> Machine:
    """The machine of this name; without one this machine, where its GPUs are known or none is asked for, else an
    H100's."""
    return machine_named(name) if name else this_machine(hardware) or machine_named(DEFAULT)


def this_machine(hardware: HardwareConfig) -> Machine | None:
    """None if the run needs GPUs and nobody says how large those here are."""
    if not hardware.gpus_per_worker:
        return Machine("this machine", 0, 0.0, host_memory())
    gpus = gpu_memories()
    return Machine("this machine", len(gpus), min(gpus), host_memory()) if gpus else None


def host_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Main memory of this machine, or what its container allows."""
    total = psutil.virtual_memory().total
    with suppress(OSError, ValueError):
        total = min(total, int((group / "memory.max").read_text()))
    return float(total)


def gpu_memories() -> list[float]:
    """Bytes of each GPU here; empty where there is none, or nobody says."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        return [float(line) * 2**20 for line in shown.split()]
    return []

"""Free memory of a worker, and keeping freed memory for reuse."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 30
LARGEST_KEPT_BYTES = 32 << 20  # glibc's maximum: half of a thread's heap


def keep_freed_memory() -> bool:
    """Makes glibc keep up to 1 GiB of freed memory for the next forward pass.

    By default it returns memory at 64 MiB, and fresh pages of the kernel take a sixth of a training step on a CPU.
    Returns False if nothing was set: `MALLOC_…` variables of the user take precedence, and other C libraries have no
    such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def free_bytes(device: torch.device, alone: bool = True) -> int:
    """Memory that this worker may still use. On a GPU this includes what torch has cached, unless something else runs
    there (`alone` False). Main memory is divided by the workers of this machine."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + (kept if alone else 0)
    free = min(psutil.virtual_memory().available, container_free_bytes())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and Ray Train


def container_free_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves (cgroup v2), not counting the file cache. A huge number without a limit."""
    with suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(limit - used + int(counts.get("inactive_file", 0)), 0)
    return 1 << 62

"""Memory of a worker: how much is free, and what becomes of main memory that was freed."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 30
LARGEST_KEPT_BYTES = 32 << 20  # glibc takes no more: half of a thread's heap


def keep_freed_memory() -> bool:
    """From now on glibc keeps up to 1 GiB of freed memory for the next pass, which needs as much again.

    It would give it back at 64 MiB, and the kernel's fresh pages cost a training step on a CPU a sixth of its time.
    False where it was not told so: the user's `MALLOC_…` variables go before, and another C library has no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or "MALLOC_TRIM_THRESHOLD_" in os.environ or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def free_bytes(device: torch.device, alone: bool = True) -> int:
    """Memory that this worker may still take. On a GPU with what torch keeps for the next tensors, if nothing else works
    there meanwhile (`alone`); of main memory its share among the workers of this machine."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + (kept if alone else 0)
    free = min(psutil.virtual_memory().available, container_free_bytes())
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun and Ray Train say it


def container_free_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves (cgroup v2); the cache of files gives way. Without a limit, more than there is."""
    with suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(limit - used + int(counts.get("inactive_file", 0)), 0)
    return 1 << 62

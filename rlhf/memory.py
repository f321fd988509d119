"""Main memory of a worker: what becomes of memory that was freed."""

from __future__ import annotations

import ctypes
import os

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

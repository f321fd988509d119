"""Freed memory is kept: whoever needs as much again gets no fresh pages from the kernel."""

import os
import subprocess
import sys

import psutil
import pytest
import torch

from rlhf.profiling import memory
from rlhf.profiling.memory import container_free_bytes, free_bytes, keep_freed_memory

FAULTS = """
import resource, torch
from rlhf.profiling.memory import keep_freed_memory

def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(64)]  # 256 MiB
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def mean():
    use()
    return sum(use() for _ in range(4)) / 4

print(mean())
keep_freed_memory()
print(mean())
"""


def faults(**settings):
    """Pages that 256 MiB take from the kernel after they were freed once, as it is and with freed memory kept."""
    own = {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "0"} | settings
    command = [sys.executable, "-W", "ignore", "-c", FAULTS]
    shown = subprocess.run(command, env=os.environ | own, check=True, capture_output=True, text=True).stdout
    return [float(line) for line in shown.split()]


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="glibc alone is told")
def test_memory_that_is_needed_again_is_not_given_back():
    given_back, kept = faults()
    assert given_back > 2**13  # of 2**16 pages
    assert kept < given_back / 5


@pytest.mark.integration  # a process of its own
def test_the_users_own_setting_goes_before():
    assert faults(MALLOC_TRIM_THRESHOLD_="4096", MALLOC_MMAP_THRESHOLD_="65536")[1] > 2**13


def test_without_glibc_nothing_changes(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()


def test_a_worker_gets_its_share_of_what_machine_and_container_leave(tmp_path, monkeypatch):
    for name, text in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 1\ninactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert container_free_bytes(tmp_path) == 400
    monkeypatch.setattr(memory, "container_free_bytes", lambda: 400)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(torch.device("cpu")) == 200
    (tmp_path / "memory.max").write_text("max\n")
    assert container_free_bytes(tmp_path) > psutil.virtual_memory().total

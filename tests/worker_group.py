"""Ranks of one process group, each in a process of its own. Their script is the test file itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def run_ranks(script: str, folder: Path, ranks: int, timeout: float | None = None) -> None:
    """`python script folder` once per rank. Fails with what they wrote if one does not exit with 0 in `timeout` seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        # What stands there already goes first: a copy of the package in which a bug was planted.
        "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT)))),
    }
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        common["CUDA_VISIBLE_DEVICES"] = ""  # else DeepSpeed would speak NCCL where there is a GPU
    # Files, not pipes: a full pipe that nobody reads stops its rank.
    logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
    members = [
        subprocess.Popen(
            [sys.executable, script, str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    end = None if timeout is None else time.monotonic() + timeout
    try:
        codes = [member.wait(None if end is None else max(0.0, end - time.monotonic())) for member in members]
    finally:
        for member in members:
            member.kill()  # those whose neighbour died, or that took too long
    assert codes == [0] * ranks, "\n".join(log.read_text() for log in logs)


def leave() -> None:
    """Ends a rank that is done. An ordinary exit aborts now and then, where a thread of the group's is not yet gone."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(0)

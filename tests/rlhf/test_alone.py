"""A rank that works alone for longer than a collective may take. Run as a script, this file is one rank."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhf.distributed import collectives
from rlhf.errors import UserError
from tests.worker_group import run_ranks

LIMIT_S = 2.0


def busy(seconds: float) -> str:
    """Works as writing and hashing do: always a little."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))
        time.sleep(0.05)
    return "written"


def failing() -> None:
    raise UserError("the disk is full", 5)


def told(work) -> str:
    try:
        return str(collectives.rank_zero_only(work, "writing the model"))
    except UserError as error:
        return f"{error.exit_code}: {error.message}"
    except RuntimeError as error:
        return f"RuntimeError: {error}"


def one_rank(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT_S))
    own = folder / f"told-{collectives.rank()}.txt"
    lines = [told(lambda: busy(3 * LIMIT_S)), told(failing)]
    start = time.monotonic()
    lines.append(told(lambda: threading.Event().wait(60)))
    lines.append(f"{time.monotonic() - start < 3 * LIMIT_S}")
    if collectives.rank() == 0:
        own.write_text("\n".join(lines))
        os.kill(os.getpid(), signal.SIGKILL)
    lines.append(told(lambda: None))
    own.write_text("\n".join(lines))
    os._exit(0)


@pytest.mark.integration
def test_others_wait_for_a_rank_that_gets_on_and_for_no_other(tmp_path):
    with pytest.raises(AssertionError):  # the first rank is killed in the end
        run_ranks(__file__, tmp_path, 2, timeout=60)
    first, second = ((tmp_path / f"told-{rank}.txt").read_text().splitlines() for rank in range(2))
    assert first[:2] == second[:2] == ["written", "5: the disk is full"]
    assert first[2] == second[2] and first[2].startswith("5: the first rank made no progress for 2 s while writing the")
    assert first[3] == second[3] == "True"
    assert second[4].startswith("RuntimeError: a rank was lost while the first one was writing the model")


def test_a_process_alone_just_works():
    assert collectives.rank_zero_only(lambda: threading.current_thread().name, "working") == "MainThread"


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))

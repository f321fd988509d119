"""A run that is asked to stop (SIGTERM, Ctrl-C) ends at the end of a step, with a checkpoint on all ranks.

The process that gets the signal calls `request`. The driver of workers elsewhere leaves a file for them instead, because
a signal reaches one process only.
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import suppress
from pathlib import Path

from rlhf.errors import UserError
from rlhf.runs.artifacts import write_json

FILE = "stop.json"

_signal = 0


def request(number: int) -> None:
    """Asks this process to stop after its step. `number` is the signal; 0 takes the request back."""
    global _signal
    _signal = number


def ask(folder: Path, number: int) -> None:
    """Asks all workers of a run to stop, or those of one attempt of a stage: `folder` is where they listen."""
    write_json(folder / FILE, {"signal": number, "time": time.time()}, durable=False)


def forget(folder: Path) -> None:
    (folder / FILE).unlink(missing_ok=True)


def listen(folder: Path) -> None:
    """Hears what `ask` said."""
    with suppress(OSError, ValueError, KeyError):
        request(int(json.loads((folder / FILE).read_text())["signal"]))


def due() -> int:
    """The signal by which any rank was asked to stop, else 0. All ranks must call it, and get the same."""
    from rlhf.distributed import collectives  # the driver needs no torch

    return collectives.largest(_signal)


def stopped(number: int, done: str) -> UserError:
    """What ends a stage that was asked to stop; `done`, for instance "after step 12", is where it goes on from."""
    name = signal.Signals(number).name
    return UserError(f"stopped by {name} {done}, with a checkpoint. The same command goes on from there.", 128 + number)

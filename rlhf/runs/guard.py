"""A thread beside the work of a rank: it ends the process when the run's driver is gone or is another one.

A rank may be in the middle of a long step or wait in a collective, where nothing else could stop it. The thread also hears
when the driver asks the stage to stop after its step.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.runs import stopping
from rlhf.runs.claim import BEAT_S, Follower

POLL_S = 1.0
LOST = 6  # exit code


@contextmanager
def guarded(follower: Follower | None) -> Iterator[None]:
    """Guards the work inside; without a claim to follow nothing is done."""
    if follower is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(follower, ended), name="guard", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        follower.end_life()


def _watch(follower: Follower, ended: threading.Event) -> None:
    shown = 0.0
    while not ended.wait(POLL_S):
        if (now := time.monotonic()) - shown >= BEAT_S:
            follower.show_life()
            shown = now
        if reason := follower.lost():
            print(f"error: stopped: {reason}", file=sys.stderr, flush=True)
            os._exit(LOST)
        for folder in follower.asking():
            stopping.listen(folder)

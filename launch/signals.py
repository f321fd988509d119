"""What SIGTERM and Ctrl-C do to `rlhf run` and `rlhf stage`: the first ends the stages after their step, the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

HANDLED = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0  # torchrun passes a signal on that its workers got too: within this time it is the same


class Handler:
    """`gently`: what the first signal does while stages run; else, and for the second, the process is interrupted."""

    def __init__(self) -> None:
        self.gently: Callable[[int], None] | None = None
        self.first, self.last = 0, signal.SIGINT.value
        self._at = 0.0

    def __call__(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.first and now - self._at < SAME_S:
            return
        if self.first or self.gently is None:
            self.last = number  # libraries may make an exception of their own of the next one
            raise KeyboardInterrupt
        self.first, self._at = number, now
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"stopping after this step, with a checkpoint; a second signal stops at once\n")
        self.gently(number)


_handler = Handler()


def install() -> None:
    """Also after a library has installed its own: Ray's would abort the process. Only the main thread can."""
    if threading.current_thread() is threading.main_thread():
        for number in HANDLED:
            signal.signal(number, _handler)


def pending() -> int:
    """The signal that asked the stages to stop, else 0."""
    return _handler.first


def interrupted_by() -> int:
    """The signal behind a KeyboardInterrupt."""
    return _handler.last


@contextmanager
def handled() -> Iterator[None]:
    """Signals interrupt, and find what was set before when it is over."""
    global _handler
    _handler = Handler()
    before = {number: signal.getsignal(number) for number in HANDLED}
    install()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def gentle(ask: Callable[[int], None]) -> Iterator[None]:
    """The first signal calls `ask`, which lets the stages end after their step."""
    _handler.gently = ask
    try:
        yield
    finally:
        _handler.gently = None

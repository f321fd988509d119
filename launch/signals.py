"""What SIGTERM and Ctrl-C do: the first ends stages after their step, and a loop between two of its steps; the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

HANDLED = (signal.SIGTERM, signal.SIGINT)
LOOK_S = 0.1
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


class Stop:
    """Of a loop: the first signal is kept, the second one interrupts."""

    number = 0
    """Of the first signal."""

    def __call__(self, number: int, _: Any) -> None:
        if self.number:
            _handler.last = number
            raise KeyboardInterrupt
        self.number = number

    @contextmanager
    def handled(self) -> Iterator[Self]:
        before = {number: signal.signal(number, self) for number in HANDLED}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def sleep(self, seconds: float) -> None:
        """Until a signal comes, at most."""
        deadline = time.monotonic() + seconds
        while not self.number and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_S))

"""SIGTERM and Ctrl-C end the watch between two looks, so that no alarm is kept and not told. The second one ends it at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

LOOK_S = 0.1


class Stop:
    number = 0
    """Of the first signal."""

    def __call__(self, number: int, _: Any) -> None:
        if self.number:
            raise KeyboardInterrupt
        self.number = number

    @contextmanager
    def handled(self) -> Iterator[Self]:
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
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

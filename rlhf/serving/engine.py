"""The thread that samples: it adds waiting rows, steps all rows, and removes those that ended.

What goes wrong in a step ends the rows that were running, and the engine goes on with a new cache.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import torch

from rlhf.serving.batch import Batch
from rlhf.serving.rows import Piece, Row

log = logging.getLogger(__name__)

Pieces = Sequence[tuple[Row, Piece]]
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # between two restarts; it doubles while no step succeeds
STALLED_S = 120.0  # a step takes no longer


class QueueFull(Exception):
    """No more rows may wait."""


class EngineDown(Exception):
    """It restarts, or is closed."""


def deliver_here(pieces: Pieces) -> None:
    """In the thread of the engine."""
    for row, piece in pieces:
        row.sink(piece)


class Engine:
    def __init__(self, make_batch: Callable[[], Batch], most_waiting: int) -> None:
        self.most_waiting, self._make_batch = most_waiting, make_batch
        self._deliver: Callable[[Pieces], None] = deliver_here
        self._waiting: deque[Row] = deque()
        self._joining: list[Row] = []  # taken from those that wait, and not yet in the cache
        self._changed = threading.Condition()
        self._closed = self._up = False
        self._batch: Batch | None = None
        self._progress = time.monotonic()
        self.restarts = self.steps = self.tokens = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, deliver: Callable[[Pieces], None] = deliver_here) -> None:
        """`deliver` takes the pieces of a step to the thread where the sinks of their rows may be called."""
        self._deliver, self._up = deliver, True
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """All of them or none. QueueFull, EngineDown."""
        with self._changed:
            if not self._up:
                raise EngineDown
            if self.waiting + len(rows) > self.most_waiting + self._free():
                raise QueueFull
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Frees their slots before the next step. Nothing more is told of them."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """Ends after the present step, which nobody waits for; rows that are unfinished fail."""
        with self._changed:
            self._closed, self._up = True, False
            self._changed.notify()

    def close(self) -> None:
        """As `stop`, and waits."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def up(self) -> bool:
        """It takes rows, and makes progress where there are some."""
        return self._up and not self.stalled

    @property
    def stalled(self) -> bool:
        return bool(self.running or self._joining) and time.monotonic() - self._progress > STALLED_S

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        batch = self._batch
        return len(batch.rows) if batch else 0

    def _free(self) -> int:
        batch = self._batch
        return batch.free if batch else 0

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._closed:
            steps = self.steps
            try:
                self._batch = self._make_batch()
                with self._changed:
                    self._up = not self._closed
                self._serve(self._batch)
            except BaseException as error:  # noqa: BLE001  whatever it was, those who wait are told
                places = "".join(traceback.format_tb(error.__traceback__))  # without its message, which may hold text
                log.error("the engine failed with %s; it restarts\n%s", type(error).__name__, places)
            self._fail_all()
            if self._closed:
                return
            self.restarts += 1
            pause_s = FIRST_PAUSE_S if self.steps > steps else min(2 * pause_s, LONGEST_PAUSE_S)
            time.sleep(pause_s)

    @torch.no_grad()
    def _serve(self, batch: Batch) -> None:
        while True:
            with self._changed:
                while not (self._closed or batch.rows or self._waiting):
                    self._changed.wait()
                if self._closed:
                    return
                batch.release()
                self._joining = self._take(batch)
            if self._joining:
                self._tell(batch, batch.admit(self._joining))
                self._joining = []
            if batch.rows:  # also after an admission: those that run do not wait for all that come
                self._tell(batch, batch.step())

    def _tell(self, batch: Batch, pieces: Pieces) -> None:
        batch.release()
        self._progress = time.monotonic()
        self.steps += 1
        self.tokens += len(pieces)
        self._deliver([(row, piece) for row, piece in pieces if not row.cancelled])

    def _take(self, batch: Batch) -> list[Row]:
        """The waiting rows that join now."""
        self._waiting = deque(row for row in self._waiting if not row.cancelled)
        count = batch.next_group(list(islice(self._waiting, batch.free)))
        return [self._waiting.popleft() for _ in range(count)]

    def _fail_all(self) -> None:
        with self._changed:
            self._up = False
            batch, self._batch = self._batch, None
            rows = dict.fromkeys([*(batch.rows if batch else ()), *self._joining, *self._waiting])
            self._waiting.clear()
            self._joining = []
        self._deliver([(row, Piece(finish="failed")) for row in rows if not (row.cancelled or row.finished)])

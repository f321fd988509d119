"""A thread that writes to the store, so that nobody waits for it. A database that is away gets the rows when it is back."""

from __future__ import annotations

import logging
import queue
import threading
import time

from sqlalchemy.exc import DBAPIError, IntegrityError

from rlhf.serving.store.store import Store
from rlhf.serving.store.tables import Exchange, Vote

log = logging.getLogger(__name__)

MOST_QUEUED, MOST_AT_ONCE = 10_000, 100
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between two tries; it doubles
CLEAN_EVERY_S = 3600.0
IDLE_S = 0.2


class Writer:
    def __init__(self, store: Store, keep_days: float | None = None, most_queued: int = MOST_QUEUED) -> None:
        """`keep_days`: older exchanges are deleted; None: none are."""
        self.store, self._keep_days = store, keep_days
        self._queue: queue.Queue[Exchange | Vote] = queue.Queue(most_queued)
        self._closing = threading.Event()
        self._cleaned = float("-inf")
        self.away = False
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    @property
    def queued(self) -> int:
        return self._queue.qsize()

    def add(self, row: Exchange | Vote) -> bool:
        """False, and counted, where the queue is full."""
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self.dropped += 1
            return False
        return True

    def close(self, patience_s: float = 10.0) -> None:
        """Writes what is queued, as far as the database takes it within this time."""
        self._closing.set()
        self._thread.join(patience_s)
        self.store.close()

    def _run(self) -> None:
        pause_s, rows = FIRST_PAUSE_S, []
        while rows or not (self._closing.is_set() and self._queue.empty()):
            rows = rows or self._next()
            try:
                self._clean()
                self._write(rows)
            except DBAPIError as error:
                if not self.away:
                    log.error("the store does not answer (%s); %s", type(error.orig).__name__, self.store.shown)
                self.away = True
                self._closing.wait(pause_s)
                if self._closing.is_set():
                    self.dropped += len(rows) + self._queue.qsize()
                    return
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                continue
            self.away, pause_s, rows = False, FIRST_PAUSE_S, []

    def _next(self) -> list[Exchange | Vote]:
        rows: list[Exchange | Vote] = []
        try:
            rows.append(self._queue.get(timeout=IDLE_S))
            while len(rows) < MOST_AT_ONCE:
                rows.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return rows

    def _write(self, rows: list[Exchange | Vote]) -> None:
        """Together, or one by one where one of them does not fit: a vote on what was deleted meanwhile."""
        if not rows:
            return
        try:
            self.store.add(rows)
            self.written += len(rows)
        except IntegrityError:
            if len(rows) == 1:
                self.dropped += 1
                return
            for row in rows:
                self._write([row])

    def _clean(self) -> None:
        if self._keep_days is not None and time.monotonic() - self._cleaned > CLEAN_EVERY_S:
            self.store.delete_older(self._keep_days)
            self._cleaned = time.monotonic()

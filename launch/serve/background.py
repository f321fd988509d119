"""Scores what the store keeps, behind the requests: nobody waits for it.

What waits is what has no score in the store. So no queue can overflow, and a restart goes on where the server stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future

from sqlalchemy.exc import DBAPIError, IntegrityError

from launch.serve.scoring import MOST_AT_ONCE, RewardModel
from launch.serve.scoring import Score as Scored
from rlhf.errors import UserError
from rlhf.serving.store import Score, Writer
from rlhf.serving.watch.records import Unscored, unscored

log = logging.getLogger(__name__)

LOOK_S = 0.2  # between two looks whether something was written
ANYWAY_S = 30.0  # other servers write to the same database
PATIENCE_S = 600.0  # for the scores of one batch
LATE_S = 3600.0  # a response that waits longer for its database is scored after a restart
MOST_FAILED = 1000


class BackgroundScoring:
    def __init__(self, writer: Writer, rewards: Mapping[str, RewardModel]) -> None:
        self.rewards, self._writer = rewards, writer
        self.scored: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._done: dict[str, float] = {}  # when nothing was left; what is much older is not looked for again
        self._not_now: set[tuple[str, str]] = set()  # (reward, id) of failures: tried again after a restart
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background scoring", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """After the present batch; the rest has its turn after the next start."""
        self._closing.set()
        self._thread.join()
        for reward in self.rewards.values():
            reward.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            written = self._writer.written
            try:
                left = [self._score_some(name, reward) for name, reward in self.rewards.items()]
            except Exception as error:  # noqa: BLE001  scoring may fail, serving may not
                if not isinstance(error, DBAPIError):  # of which the writer speaks
                    log.error("background scoring failed with %s; it goes on", type(error).__name__)
                left = []
            if not any(left):
                self._wait_for_more(written)

    def _wait_for_more(self, written: int) -> None:
        deadline = time.monotonic() + ANYWAY_S
        while self._writer.written == written and time.monotonic() < deadline:
            if self._closing.wait(LOOK_S):
                return

    def _score_some(self, name: str, reward: RewardModel) -> bool:
        """One batch of one reward model; whether there may be more."""
        without = {each for of, each in self._not_now if of == name}
        if len(without) > MOST_FAILED:  # something is wrong with the model, not with responses
            return False
        since, now = self._done.get(name, LATE_S) - LATE_S, time.time()
        rows = unscored(self._writer.store, name, reward.digest, MOST_AT_ONCE, since, without)
        futures = [self._submit(reward, row) for row in rows]
        for row, future in zip(rows, futures, strict=True):
            self._keep(name, reward, row, future)
        if len(rows) == MOST_AT_ONCE:
            return True
        self._done[name] = now
        return False

    def _submit(self, reward: RewardModel, row: Unscored) -> Future[Scored] | None:
        try:
            return reward.submit(row.messages, row.response)
        except UserError:
            return None

    def _keep(self, name: str, reward: RewardModel, row: Unscored, future: Future[Scored] | None) -> None:
        """A response that the model cannot read has the score None; after another failure there is none."""
        score = Score(row.id, name, None, digest=reward.digest)
        try:
            if future is not None:
                value, raw = future.result(PATIENCE_S)
                score = Score(row.id, name, value, raw, reward.digest)
        except Exception:  # noqa: BLE001  the reward model has logged it
            self.failed[name] += 1
            self._not_now.add((name, row.id))
            return
        try:
            self._writer.store.add_scores([score])
        except IntegrityError:  # deleted meanwhile
            return
        self.scored[name] += 1

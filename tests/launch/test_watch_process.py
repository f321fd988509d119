"""`rlhf watch` as a process that looks again and again: alarms, signals, and a database that goes and comes back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf.serving.store import Exchange, Score, Store
from rlhf.serving.watch.records import newest_alarms
from tests.rlhf.serving.test_store import needs_postgresql, pg_ctl, start_postgresql, until
from tests.rlhf.tracking.stores import postgresql

ROOT = Path(__file__).parents[2]
RULES = 'rules: [{metric: unsafe, op: ">", value: 0.2, window: 1h}]'
EVERY_S = 0.3
PATIENCE_S = 60


class Watch:
    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self._log = process, log

    def said(self, words: str) -> int:
        return self._log.read_text().count(words)

    def wait_for(self, words: str, times: int = 1) -> None:
        until(lambda: self.process.poll() is not None or self.said(words) >= times)
        assert self.said(words) >= times, self._log.read_text()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextmanager
def watching(store: str, at: Path) -> Iterator[Watch]:
    (at / "rules.yaml").write_text(RULES)
    command = [sys.executable, "-m", "launch.cli", "watch", "--store", store, "--rules", "rules.yaml"]
    options = ["--every", str(EVERY_S), "--tracking-uri", "null"]
    with (at / "log").open("w") as out:
        process = subprocess.Popen(
            [*command, *options], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=at, stdout=out, stderr=out
        )
    try:
        yield Watch(process, at / "log")
    finally:
        process.kill()
        process.wait()


def say(store: Store, count: int, logit: float) -> None:
    """Responses with this logit of safety."""
    first = len(store.exchanges())
    for number in range(first, first + count):
        said = [{"role": "user", "content": f"question {number}"}]
        store.add([Exchange(f"r{number}", "chat", "m", None, said, "a secret answer", "stop", 3, 9, 2.0, {})])
        store.add_scores([Score(f"r{number}", "safety", logit, logit)])


def ended(store: Store) -> list[bool]:
    return [alarm.ended is not None for alarm in newest_alarms(store, 9)]


@needs_postgresql
@pytest.mark.integration
def test_a_watch_tells_an_alarm_once_and_outlives_its_database(tmp_path: Path) -> None:
    with postgresql() as uri:
        store, folder = Store(uri), Path(uri.partition("host=")[2])
        with watching(uri, tmp_path) as watch:
            say(store, 5, 3.0)
            until((tmp_path / "feedback/watch/metrics.jsonl").exists)  # it has looked
            say(store, 10, -3.0)
            watch.wait_for("alarm began: unsafe > 0.2 in 1h: 0.6667")
            pg_ctl(folder, "-m", "immediate", "stop")
            watch.wait_for("does not answer (OperationalError); the watch goes on", times=2)
            start_postgresql(folder)
            say(store, 60, 3.0)
            watch.wait_for("alarm ended")
            assert watch.end(signal.SIGTERM) == 143
            assert (watch.said("alarm began"), watch.said("alarm ended"), watch.said("secret")) == (1, 1, 0)
        assert ended(store) == [True]
        store.close()


@pytest.mark.integration
def test_ctrl_c_ends_a_watch_between_two_looks(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/feedback/feedback.db")
    say(store, 5, -3.0)
    with watching("feedback", tmp_path) as watch:
        watch.wait_for("alarm began")
        assert watch.end(signal.SIGINT) == 130
        assert watch.said("Traceback") == watch.said("error") == 0
    assert (tmp_path / "feedback/watch/metrics.jsonl").read_text().count("watch/unsafe/1h_low") >= 1
    store.close()

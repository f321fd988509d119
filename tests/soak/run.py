"""A pipeline on the testbed whose command is given again and again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil

from launch.testbed import Testbed
from tests.faults.runs import COMMAND, SMOKE

LIMIT_S = 600.0
POLL_S = 0.1
ENDS_S = 120.0  # for the workers of a driver that was killed
Found = TypeVar("Found")


class Trouble(Exception):
    """The run did not do what it should."""


class Finished(Exception):
    """The pipeline is complete."""


class Pipeline:
    def __init__(self, testbed: Testbed, name: str, settings: list[str]) -> None:
        self.testbed, self._name = testbed, name
        self.folder = testbed.shared / "runs" / name
        self.log = testbed.folder / "logs" / f"{name}.log"
        words = [sys.executable, "-c", COMMAND, "run", str(SMOKE), "--name", name, "--tracking.uri", "null"]
        self._words = [*words, *settings, "--hardware.ray_address", testbed.address]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        with self.log.open("a") as output:
            self._process = self.testbed.popen(1, self._words, stdout=output, stderr=subprocess.STDOUT)

    def signal(self, number: signal.Signals) -> None:
        """To the driver."""
        drivers = self.testbed.processes(1, f" --name {self._name} ")
        if not drivers:
            raise Trouble("there is no driver")
        drivers[0].send_signal(number)

    def ended(self, seconds: float) -> int:
        """The exit code of the driver, when it has ended."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Trouble(f"the driver did not end within {seconds:.0f} s") from None

    def wait_for(self, condition: Callable[[], Found | None], what: str, seconds: float = LIMIT_S) -> Found:
        """What `condition` finds. Trouble where the driver fails meanwhile, or it takes too long."""
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if (code := self._process.poll()) is not None:
                if code == 0:
                    raise Finished
                raise Trouble(f"exit code {code}: {self.last_line()}")
            if time.monotonic() > deadline:
                raise Trouble(f"after {seconds:.0f} s still waiting for {what}; {self.last_line()}")
            time.sleep(POLL_S)
        return found

    def kill(self) -> None:
        """Ends the driver, if it runs, and waits until its workers have gone."""
        with suppress(Trouble, psutil.Error):
            self.signal(signal.SIGKILL)
        self.ended(ENDS_S)
        deadline = time.monotonic() + ENDS_S
        while workers := [
            one for node in self.testbed.nodes() for one in self.testbed.processes(node, "RayTrainWorker")
        ]:
            if time.monotonic() > deadline:
                raise Trouble(f"{len(workers)} workers are still there {ENDS_S:.0f} s after their driver was killed")
            time.sleep(POLL_S)

    def last_line(self) -> str:
        return self.log.read_text().strip().rpartition("\n")[2][:300]

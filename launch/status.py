"""`runs/<run>/status.json`: what each stage does, whom the run waits for and since when, and how it ended."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from launch.terminal import StageBars
from rlhf.runs.artifacts import write_json

FILE = "status.json"
SHOWN_AFTER_S = 30.0  # on the terminal; the file has every wait at once


class Status:
    """Written when something changes. The terminal gets a line for a wait that lasts."""

    def __init__(self, run_folder: Path, bars: StageBars) -> None:
        self._path, self._bars = run_folder / FILE, bars
        self._stages: dict[str, dict[str, Any]] = {}
        self._ended: dict[str, str] | None = None
        self._written: Any = None
        self._waits: dict[str, tuple[str, float, bool]] = {}  # stage → whom it waits for, since when, was it said

    def set(self, stage: str, state: str, waits_for: str = "", restarts: int = 0) -> None:
        self._stages[stage] = {"state": state, "waits_for": waits_for, "restarts": restarts}
        whom, now = waits_for.rpartition(", since ")[0] or waits_for, time.monotonic()
        earlier, since, said = self._waits.get(stage, ("", now, False))
        if whom != earlier:
            since, said = now, False
        if whom and not said and now - since > SHOWN_AFTER_S:
            said = True
            self._bars.say_once(f"{stage}: waits for {waits_for}")
        self._waits[stage] = (whom, since, said)
        self._write()

    def end(self, status: str, reason: str) -> None:
        """The first end of a run is its end."""
        if self._ended is not None:
            return
        for values in self._stages.values():
            values["waits_for"] = ""
        self._ended = {"status": status, "reason": reason}
        self._write()

    def _write(self) -> None:
        content = {"stages": self._stages, "ended": self._ended}
        if content == self._written:
            return
        self._written = deepcopy(content)
        driver = {"host": socket.gethostname(), "pid": os.getpid()}
        with suppress(OSError):  # storage may be away for a while
            write_json(self._path, content | {"driver": driver, "time": time.time()}, durable=False)

"""Signs of life of the ranks of a stage: a file per rank, which its guard touches every few seconds.

They lie in `<stage>/ranks/<attempt>/`. The driver watches them, and removes those of an attempt that it has given up: a rank
without its file stops, for instance one whose node was cut off and is back.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rlhf.runs.artifacts import write_json
from rlhf.runs.claim import is_alive, place_of_pids

FOLDER = "ranks"
FETCHED = "fetched"  # the base model is on every node, so ranks can be placed


@dataclass(frozen=True)
class Rank:
    rank: int
    host: str
    place: str  # where `pid` is valid
    pid: int
    started: float  # seconds since 1970

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def is_here(self) -> bool:
        """Whether it runs where this process can see it."""
        return self.place == place_of_pids()

    @property
    def is_gone(self) -> bool:
        """False where nobody can tell from here."""
        return self.is_here and not is_alive(self.pid, self.started)


def begin(stage_folder: Path, attempt: str) -> Path:
    """An empty folder for the ranks of a new attempt; earlier attempts are given up."""
    shutil.rmtree(stage_folder / FOLDER, ignore_errors=True)
    folder = stage_folder / FOLDER / attempt
    folder.mkdir(parents=True)
    return folder


def fetched(attempt_folder: Path) -> None:
    (attempt_folder / FETCHED).touch()


def show(attempt_folder: Path, rank: int) -> Path:
    """Writes the file of this process."""
    pid = os.getpid()
    own = Rank(rank, socket.gethostname(), place_of_pids(), pid, psutil.Process(pid).create_time())
    path = attempt_folder / f"rank-{rank}.json"
    write_json(path, asdict(own), durable=False)
    return path


def read(attempt_folder: Path) -> dict[int, Rank]:
    """The ranks that have begun."""
    found = {}
    for path in attempt_folder.glob("rank-*.json"):
        try:
            one = Rank(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            continue
        found[one.rank] = one
    return dict(sorted(found.items()))


def beats(attempt_folder: Path) -> dict[int, float]:
    """When each rank was last touched, by the clock of the storage."""
    found = {}
    for path in attempt_folder.glob("rank-*.json"):
        try:
            with path.open("rb") as stream:  # opened anew, because network file systems then ask the server
                found[int(path.stem.removeprefix("rank-"))] = os.fstat(stream.fileno()).st_mtime
        except OSError:
            continue
    return found

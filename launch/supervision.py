"""What the driver decides about the workers of a stage: who is silent, why they ended, whether they are started again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.worker import ATTEMPT_MARK, FAILURE, UNEXPECTED, read_failure
from rlhf.errors import UserError
from rlhf.runs import life
from rlhf.runs.storage import is_full

SILENT_S = 45.0  # without a sign of life: its group is started again
WATCHED_S = 15.0  # the run says whom it waits for
NO_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
FATAL = re.compile(r"^Fatal Python error: ([A-Z][\w ]+)$", re.MULTILINE)
LOST_NODE = re.compile(r"node (has )?died|node was (terminated|marked dead)|preempt", re.IGNORECASE)
TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Ended:
    """How an attempt ended that failed, as Ray tells it."""

    text: str
    died: Mapping[int, str] = field(default_factory=dict)  # ranks whose process is gone, and what Ray says about it
    no_room: bool = False  # the workers could not be placed in time


@dataclass(frozen=True)
class Cause:
    error: UserError
    can_restart: bool


class Watch:
    """When each rank of an attempt was last heard, by this process's clock: none is compared with that of another host."""

    def __init__(self, folder: Path, workers: int, now: float) -> None:
        self._folder, self._workers, self._begun = folder, workers, now
        self._placing: float | None = None  # since when the workers could be placed
        self._heard: dict[int, tuple[float, float]] = {}  # rank → its file's time, and when that changed
        self._ended: set[int] = set()  # ranks that have done their work, and removed their file
        self._ranks: dict[int, life.Rank] = {}
        self.gone: list[int] = []  # those on this host that were the first to be dead

    def look(self, now: float, storage_fault: str = "", unreachable: Collection[str] = ()) -> None:
        """Nobody counts as silent while the storage cannot be written. Nobody is heard on the hosts that are `unreachable`:
        ranks there may still write to the storage, but none of the others hears them."""
        beats = life.beats(self._folder)
        if self._placing is None and (beats or (self._folder / life.FETCHED).exists()):
            self._placing = now
        if self._folder.is_dir():
            self._ended |= self._heard.keys() - beats.keys()
        if self._ranks.keys() != beats.keys():
            self._ranks = life.read(self._folder)
        self.gone = self.gone or [rank for rank, one in self._ranks.items() if one.is_gone]
        cut = {rank for rank, one in self._ranks.items() if one.host in unreachable}
        for rank, beat in beats.items():
            if storage_fault or rank not in self._heard or (self._heard[rank][0] != beat and rank not in cut):
                self._heard[rank] = (beat, now)

    def silent(self, now: float, limit_s: float = SILENT_S) -> dict[int, float]:
        """Seconds of silence of every rank that is silent for longer than `limit_s`."""
        return {
            rank: now - heard
            for rank, (_, heard) in self._heard.items()
            if now - heard > limit_s and rank not in self._ended
        }

    def missing(self) -> list[int]:
        """Ranks that have not begun."""
        return [rank for rank in range(self._workers) if rank not in self._heard]

    def overdue(self, now: float, limit_s: float) -> list[int]:
        """Ranks that did not begin in time."""
        return self.missing() if self._placing is not None and now - self._placing > limit_s else []

    def waits_for(self, now: float, limit_s: float) -> str:
        """Whom the group waits for, since when, and how long at most; "" if all ranks are heard."""
        if silent := self.silent(now, WATCHED_S):
            named = ", ".join(str(self._ranks.get(rank, f"rank {rank}")) for rank in silent)
            return f"a sign of life of {named}, {since(max(silent.values()), SILENT_S)}"
        if self._placing is None:
            return f"its base model on every node, since {_clock(now - self._begun)}"
        if len(missing := self.missing()) == self._workers:
            return f"its {self._workers} workers to be placed and to start, {since(now - self._placing, limit_s)}"
        if missing:
            return f"rank {', '.join(map(str, missing))} to start, {since(now - self._placing, limit_s)}"
        return ""


class Budget:
    """Restarts that are left. It is refilled by every checkpoint, because what is done is not lost again."""

    def __init__(self, restarts: int) -> None:
        self._restarts, self.used, self._reached = restarts, 0, -1

    def allows(self, checkpoint: int) -> bool:
        """Whether to start again after a death, where `checkpoint` is the number of the newest one, -1 for none."""
        if checkpoint > self._reached:
            self._reached, self.used = checkpoint, 0
        if self.used == self._restarts:
            return False
        self.used += 1
        return True


def cause(stage_folder: Path, attempt: Path, ended: Ended, given_up: Sequence[int], memory: str) -> Cause:
    """Why an attempt ended: the first death, and not what the other ranks met because of it.

    `given_up`: ranks that the driver ended because they were silent or did not start. `memory`: what to do where memory is short.
    """
    noted, ranks = read_failure(stage_folder), life.read(attempt)
    if noted is not None and noted.exit_code != UNEXPECTED:
        return Cause(noted, can_restart=False)
    if is_full(ended.text):
        return Cause(
            UserError(f"the disk of {stage_folder} is full. Free some space and run again.", 5), can_restart=False
        )
    if ended.no_room:
        return Cause(UserError(ended.text, 5), can_restart=False)
    return Cause(_accident(stage_folder, ranks, ended, given_up, memory) or noted or _unknown(ended), can_restart=True)


def _accident(
    stage_folder: Path, ranks: Mapping[int, Any], ended: Ended, given_up: Sequence[int], memory: str
) -> UserError | None:
    if silent := [str(ranks[rank]) for rank in given_up if rank in ranks]:
        return UserError(f"{', '.join(silent)} gave no sign of life for {SILENT_S:.0f} s: stopped, or cut off", 6)
    if given_up:
        named = ", ".join(f"rank {rank}" for rank in given_up)
        return UserError(
            f"{named} did not start in time (hardware.placement_timeout_s): a node is too busy, or lost", 6
        )
    if any(NO_MEMORY.search(text) for text in (*ended.died.values(), ended.text)):
        return UserError(f"a worker was killed because the machine ran out of memory. {memory}", 5)
    dead = _dead_peers(stage_folder) or [*ended.died]
    if not dead:
        return None
    return UserError(", ".join(_death(stage_folder, rank, ranks, ended) for rank in dead), 6)


def _unknown(ended: Ended) -> UserError:
    return UserError(f"a worker died: {ended.text.strip().splitlines()[-1][:300]}", 6)


def newest_checkpoint(stage_folder: Path) -> int:
    """The step or iteration of the newest complete checkpoint, -1 if there is none."""
    names = [path.parent.name for path in stage_folder.glob("checkpoints/*/state.json")]
    return max((int(name.rpartition("-")[2]) for name in names if not name.startswith("damaged-")), default=-1)


def _dead_peers(stage_folder: Path) -> list[int]:
    """Ranks that were gone when another one failed, as that one saw it."""
    try:
        return list(json.loads((stage_folder / FAILURE).read_text()).get("dead", ()))
    except (OSError, ValueError):
        return []


def _death(stage_folder: Path, rank: int, ranks: Mapping[int, Any], ended: Ended) -> str:
    name = str(ranks.get(rank, f"rank {rank}"))
    if LOST_NODE.search(ended.died.get(rank, "")):
        return f"{name} was lost with its node"
    if fatal := FATAL.findall(_tail(stage_folder / "logs" / f"rank-{rank}.log")):
        return f"{name} crashed ({fatal[-1]})"
    return f"{name} was killed (signal 9)"


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - TAIL_BYTES))
            return stream.read().decode(errors="replace").rpartition(ATTEMPT_MARK)[2]
    except OSError:
        return ""


def since(seconds: float, limit_s: float) -> str:
    """How a wait is said that has taken `seconds`."""
    return f"since {_clock(seconds)}, {limit_s:.0f} s at most"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(time.time() - seconds))

"""A stage as a group of workers on Ray."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from launch import attempt, network, signals
from launch.connection import connection
from launch.elastic import GROW, LOOKS_S, can_grow, fits, needed, processes, sized, stopped_to_grow
from launch.supervision import Budget, Watch, cause, newest_checkpoint, since
from launch.worker import FAILURE, memory_remedy, read_failure
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim, life, stopping
from stages.base import parts_of, stage_of

KINDS = ("CPU", "GPU")
ENDS_S = 10.0  # for Ray to see that a process is gone; with the silence before it below a minute
FREED_S = 3.0  # between two looks for room that a killed attempt still holds


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """A connection with a cluster that has room for the run, and whose nodes agree."""
    with connection(config.hardware.ray_address, config.folder / "ray"):
        _wait_for_room(config)
        if config.hardware.ray_address is None:
            yield
            return
        _compare_nodes(config)
        with network.watched():
            yield


class WorkerGroup:
    """A running stage. `done()` says whether it has ended; `result()` raises what the stage raised.

    Where a worker dies or is silent, the group is started again from the newest checkpoint. One that is smaller than it
    should be is started again when the cluster has room.
    """

    def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
        self._config, self._stage, self._workers = config, stage, workers
        self._folder = config.folder / stage
        self._budget = Budget(config.hardware.max_restarts)
        self._error: UserError | None = None
        self._accident = ""  # why the attempt before this one ended
        self._attempts, self.restarts = 0, 0
        self.news: list[str] = []  # lines for people that nobody has seen yet
        self._reference: Any = None  # of the attempt; None while it waits for something to begin
        self._due, self._obstacle = time.monotonic(), ""
        self._begin()

    def done(self, timeout_s: float) -> bool:
        import ray

        if self._reference is None:
            time.sleep(timeout_s)
            self._begin()
            return self._error is not None
        if ray.wait([self._reference], timeout=timeout_s)[0]:
            return self._has_ended()
        now = time.monotonic()
        self._watch.look(now, claim.storage_fault(), network.unreachable_hosts())
        if self.restarts and self._watch.missing() and now - self._freed > FREED_S:
            self._freed = now
            attempt.free_places()
        late = self._late(now)
        if self._given_up and late:
            self._end_for_good(now)
        elif late:
            self._give_up(late, now)
        elif self._given_up:  # they are back, or have begun after all
            self._given_up = None
        elif now > self._looks and not self._watch.missing():
            self._grow(now)
        return False

    def result(self) -> None:
        if self._error is not None:
            raise self._error

    def waits_for(self) -> str:
        """Whom the group waits for and since when, "" if it works."""
        now = time.monotonic()
        if self._reference is None:
            return f"{self._obstacle}, {since(now - self._due, self._limit_s)}"
        if fault := claim.storage_fault():
            return f"the storage of {self._config.runs_dir} ({fault})"
        return self._watch.waits_for(now, 2 * self._limit_s)

    @property
    def _limit_s(self) -> float:
        """For room in the cluster, and as long again to start there."""
        return self._config.hardware.placement_timeout_s

    def _begin(self) -> None:
        """Begins the next attempt as soon as it can."""
        try:
            config = self._with_room()
            if config is not None:
                self._begin_with(config)
        except OSError as error:
            self._obstacle = f"the storage of {self._folder} ({error.strerror or error})"
            if time.monotonic() - self._due > self._limit_s:
                text = f"{self._folder} could not be written for {self._limit_s:.0f} s: {error.strerror or error}"
                self._error = UserError(text, 5)

    def _with_room(self) -> RunConfig | None:
        """The settings, with fewer workers where a node stays away for `placement_timeout_s`; None while it may be back."""
        if self._config.hardware.min_workers is None or fits(self._config, self._stage, have := cluster_resources()):
            return self._config
        if time.monotonic() - self._due < self._limit_s:
            self._obstacle = f"room for all of its {self._workers} workers"
            return None
        return sized(self._config, self._stage, have)

    def _begin_with(self, config: RunConfig) -> None:
        self._attempts += 1
        self._place = life.begin(self._folder, f"attempt-{self._attempts}-{time.time_ns()}")
        (self._folder / FAILURE).unlink(missing_ok=True)
        workers = self._workers if config is self._config else stage_of(self._stage).workers(config)
        note = f"goes on with {workers} of {self._workers} workers: the cluster has no room for more"
        self._watch = Watch(self._place, workers, time.monotonic())
        self._smaller = config
        self._looks = time.monotonic() + LOOKS_S if workers < self._workers else math.inf
        self._given_up: tuple[list[int], float] | None = None
        self._freed = time.monotonic()
        self._killed_for_memory = attempt.memory_kills()
        own = attempt.Attempt(self._stage, self._place.name, workers, note if workers < self._workers else "")
        self._reference = attempt.start(config, own)

    def _has_ended(self) -> bool:
        ended = attempt.outcome(self._reference)
        if ended is None:
            return True
        checkpoint, failure = newest_checkpoint(self._folder), read_failure(self._folder)
        if stopped_to_grow(failure):
            return self._grown(checkpoint)
        ranks = self._given_up[0] if self._given_up else []
        if attempt.memory_kills() > self._killed_for_memory:
            ended = replace(ended, text=f"out of memory\n{ended.text}")
        if not ended.died and failure is None:  # Ray says less of a death while the group opens
            ended = replace(ended, died=dict.fromkeys(self._watch.gone, ""))
        found = cause(self._folder, self._place, ended, ranks, memory_remedy(self._config, self._stage))
        if not found.can_restart or signals.pending() or not self._budget.allows(checkpoint):
            self._error = _after(self._accident, found.error) if ended.no_room else found.error
            return True
        self._accident = found.error.message
        start = f"goes on after step {checkpoint}" if checkpoint >= 0 else "starts over, for it has no checkpoint yet"
        left = self._config.hardware.max_restarts - self._budget.used
        return self._again(f"{found.error.message}; {start} (restarts left until the next checkpoint: {left})", 0.0)

    def _again(self, news: str, waited_s: float) -> bool:
        """Begins another attempt, which has waited for room as long as that. True if it cannot."""
        self.restarts += 1
        self.news.append(news)
        self._reference, self._due = None, time.monotonic() - waited_s
        self._begin()
        return self._error is not None

    def _grow(self, now: float) -> None:
        """Asks a group that is too small to stop after its step, if there is room for more."""
        import ray

        self._looks = now + LOOKS_S
        if can_grow(self._config, self._smaller, self._stage, cluster_resources(), counted(ray.available_resources())):
            self._looks = math.inf
            stopping.ask(self._place, GROW)

    def _grown(self, checkpoint: int) -> bool:
        if number := signals.pending():
            self._error = stopping.stopped(number, f"after step {checkpoint}")
            return True
        return self._again(
            f"stopped after step {checkpoint} to go on with more workers: there is room again", self._limit_s
        )

    def _late(self, now: float) -> list[int]:
        """Ranks that are silent, or did not start in time."""
        return [*self._watch.silent(now), *self._watch.overdue(now, 2 * self._limit_s)]

    def _give_up(self, late: list[int], now: float) -> None:
        """Ends silent ranks here, so that Ray sees their death; elsewhere Ray ends the whole group in `_end_for_good`: at once
        where their node is cut off, for Ray may take a minute to see that."""
        cut_off = network.unreachable_hosts()
        ranks = [one for rank, one in life.read(self._place).items() if rank in late]
        self._given_up = (late, now if any(one.host in cut_off for one in ranks) else now + ENDS_S)
        for one in ranks:
            if one.is_here and not one.is_gone:
                os.kill(one.pid, signal.SIGKILL)

    def _end_for_good(self, now: float) -> None:
        import ray

        if self._given_up and now > self._given_up[1]:
            ray.cancel(self._reference, force=True)


def has_room(config: RunConfig, stage: str, running: Iterable[tuple[RunConfig, str]]) -> bool:
    """Whether the stage fits beside those that run. UserError(5) if it does not fit alone."""
    have = cluster_resources()
    _check_room(config, stage, have)
    used = Counter[str]()
    for other in [*running, (config, stage)]:
        used.update(needed(sized(*other, have), other[1]))
    return all(used[kind] <= have[kind] for kind in KINDS)


def _compare_nodes(config: RunConfig) -> None:
    """The quick half of `rlhf doctor`. UserError where a run could not work."""
    from launch.doctor.examine import examine_nodes
    from launch.doctor.result import in_a_line, raise_failed
    from launch.terminal import console

    results = list(examine_nodes(config, thorough=False))
    for one in results:
        if one.verdict == "warning":
            console.print(f"warning: {in_a_line(one)}", style="yellow", markup=False, highlight=False)
    raise_failed(results)


def _wait_for_room(config: RunConfig) -> None:
    """UserError(5) if the largest worker group cannot be placed. Waits for a cluster that is still starting."""
    hardware = config.hardware
    largest = max(parts_of(config), key=lambda part: processes(config, part))
    begun, limit_s = time.monotonic(), hardware.placement_timeout_s if hardware.ray_address else 0.0
    was_said = False
    while not fits(config, largest, have := cluster_resources()) and time.monotonic() - begun < limit_s:
        claim.require()
        if not was_said:
            needs, limit = _lack(config, largest, have), f"{since(0, limit_s)} (hardware.placement_timeout_s)"
            print(f"waits for nodes: {needs}, {limit}", file=sys.stderr, flush=True)
            was_said = True
        time.sleep(1)
    _check_room(config, largest, have)


def _check_room(config: RunConfig, stage: str, have: Mapping[str, float]) -> None:
    if lack := _lack(sized(config, stage, have), stage, have):
        kind = "gpus" if "GPU" in lack else "cpus"
        raise UserError(f"{lack}. Lower hardware.workers or hardware.{kind}_per_worker, or add nodes.", 5)


def _lack(config: RunConfig, stage: str, have: Mapping[str, float]) -> str:
    """What the stage needs more than the cluster has, "" if it fits."""
    workers = processes(config, stage)
    for kind, all_need in needed(config, stage).items():
        if all_need > have[kind]:
            return (
                f"{workers} workers × {all_need / workers:g} {kind}s = {all_need:g}, but the cluster has {have[kind]:g}"
            )
    return ""


def cluster_resources() -> dict[str, float]:
    """What the cluster has, less what lies on nodes that the driver does not reach."""
    import ray

    have = counted(ray.cluster_resources())
    for node in network.unreachable():
        have = {kind: have[kind] - amount for kind, amount in counted(node.resources).items()}
    return have


def counted(resources: Mapping[str, float]) -> dict[str, float]:
    return {kind: resources.get(kind, 0.0) for kind in KINDS}


def _after(accident: str, error: UserError) -> UserError:
    """The first cause stands before what came of it."""
    return UserError(f"{accident}, and then {error.message}", error.exit_code) if accident else error

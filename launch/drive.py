"""Makes the stages of one run or of several: each as soon as its inputs are there, and once for all runs that share it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from launch import signals, worker_group
from launch.stage_folder import Data, failure_of, prepare, recipe, share
from launch.status import Status
from launch.terminal import StageBars
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim, stopping
from rlhf.tracking import status_of
from stages.base import parts_of, stage_of

POLL_S = 0.3


@dataclass(eq=False)
class DrivenRun:
    """A run, with the stages that are still to be made and how long each took."""

    config: RunConfig
    data: Data
    waiting: list[str]
    running: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def starting(self) -> None:
        """Called before each of its stages starts."""

    def ready(self) -> list[str]:
        """The stages whose inputs are there."""
        unfinished = {*self.waiting, *self.running}
        return [stage for stage in self.waiting if not unfinished & {*stage_of(stage).inputs(self.config)}]


Run = TypeVar("Run", bound=DrivenRun)


@dataclass(frozen=True)
class Ended(Generic[Run]):
    """A stage that was made, or taken over from `shared`, its folder in another run, or failed."""

    run: Run
    stage: str
    shared: Path | None = None
    failure: UserError | None = None


@dataclass(frozen=True)
class Part(Generic[Run]):
    """A stage that runs."""

    run: Run
    stage: str
    recipe: str
    group: worker_group.WorkerGroup
    started: float


Fits = Callable[[RunConfig, str, Sequence[Part]], bool]
"""Whether a stage may start beside those that run. UserError if it never can."""


def fits_now(config: RunConfig, stage: str, running: Sequence[Part]) -> bool:
    return worker_group.has_room(config, stage, [(part.run.config, part.stage) for part in running])


def fits_beside(config: RunConfig, stage: str, running: Sequence[Part]) -> bool:
    """A stage alone is left to the cluster, which may have more room soon."""
    return not running or fits_now(config, stage, running)


class Driver(Generic[Run]):
    def __init__(self, runs: Sequence[Run], bars: StageBars, fits: Fits = fits_beside) -> None:
        self._runs, self._bars, self._fits = runs, bars, fits
        self._running: list[Part[Run]] = []
        self._stopped: list[UserError] = []
        self._statuses: dict[Path, Status] = {}  # by the folder of the run
        self._recipes = {
            (run, stage): recipe(run.config, stage, run.data) for run in runs for stage in parts_of(run.config)
        }
        self._known: dict[str, Path | UserError] = {  # recipe → where it was made, or why it was not
            own: run.config.folder / stage for (run, stage), own in self._recipes.items() if stage not in run.waiting
        }

    def ended(self) -> Iterator[Ended[Run]]:
        """Yields each stage when it has ended. Where one fails, no further stage of its run starts.

        UserError (130, 143) when all have ended that ran when somebody stopped them.
        """
        try:
            with signals.gentle(self._ask_to_stop):
                yield from self._until_stopped()
            if number := signals.pending():
                between = UserError(f"stopped by {signal.Signals(number).name} between two stages", 128 + number)
                raise self._stopped[0] if self._stopped else between
        except GeneratorExit:  # a run has failed, and said so
            raise
        except BaseException as error:
            self._end(status_of(error), error.message if isinstance(error, UserError) else type(error).__name__)
            raise
        self._end("FINISHED", "")

    def _end(self, status: str, reason: str) -> None:
        for one in self._statuses.values():
            one.end(status, reason)

    def _until_stopped(self) -> Iterator[Ended[Run]]:
        while self._running or (any(run.waiting for run in self._runs) and not signals.pending()):
            claim.require()
            for run in self._runs:
                for stage in run.ready():
                    yield from self._begin(run, stage)
            for part in [*self._running]:
                has_ended = part.group.done(POLL_S / len(self._running))
                self._tell(part)
                if has_ended:
                    yield from self._finish(part)
            self._bars.refresh()

    def _ask_to_stop(self, number: int) -> None:
        for part in self._running:
            stopping.ask(part.run.config.folder, number)

    def _begin(self, run: Run, stage: str) -> Iterator[Ended[Run]]:
        """Starts the stage or takes it over. Nothing while it has to wait: for room, or for another run that makes it."""
        own = self._recipes[run, stage]
        known = self._known.get(own)
        if stage not in run.waiting or own in {part.recipe for part in self._running} or signals.pending():
            return
        try:
            if isinstance(known, UserError):
                raise known
            if known is None and not self._fits(run.config, stage, self._running):
                beside = ", ".join(self._label(part.run, part.stage) for part in self._running)
                self._status(run).set(stage, "waiting", f"room in the cluster beside {beside}")
                return
            run.waiting.remove(stage)
            if known is None:
                self._start(run, stage, own)
            else:
                share(run.config, stage, run.data, known)
                yield Ended(run, stage, shared=known)
        except UserError as error:
            run.waiting.clear()
            self._status(run).end("FAILED", error.message)
            yield Ended(run, stage, failure=error)

    def _start(self, run: Run, stage: str, own: str) -> None:
        run.starting()
        prepare(run.config, stage, run.data)
        self._bars.add(self._label(run, stage))
        group = worker_group.WorkerGroup(run.config, stage, stage_of(stage).workers(run.config))
        self._running.append(Part(run, stage, own, group, time.monotonic()))
        run.running.append(stage)

    def _tell(self, part: Part[Run]) -> None:
        """Says what happened to the workers of a stage, and whom it waits for."""
        group, label = part.group, self._label(part.run, part.stage)
        while group.news:
            self._bars.say_once(f"{label}: {group.news.pop(0)}")
        ends = "the end of its step and a checkpoint" if signals.pending() else ""
        self._status(part.run).set(part.stage, "running", group.waits_for() or ends, group.restarts)

    def _status(self, run: Run) -> Status:
        return self._statuses.setdefault(run.config.folder, Status(run.config.folder, self._bars))

    def _finish(self, part: Part[Run]) -> Iterator[Ended[Run]]:
        run, stage, failure = part.run, part.stage, None
        self._running.remove(part)
        run.running.remove(stage)
        try:
            part.group.result()
            self._known[part.recipe] = run.config.folder / stage
            run.seconds[stage] = time.monotonic() - part.started
        except Exception as error:  # noqa: BLE001  whatever Ray wraps around it, people get one message
            failure = failure_of(run.config, stage, error)
        label, state = self._label(run, stage), "failed" if failure else "done"
        state = "stopped" if failure is not None and failure.is_stop else state
        self._status(run).set(stage, state, restarts=part.group.restarts)
        if failure is not None and failure.is_stop:  # those beside it stop after their step too
            self._bars.finish(label, "stopped")
            self._stopped.append(failure)
            return
        self._bars.finish(label, "failed" if failure else "done")
        if failure is not None:
            self._status(run).end("FAILED", failure.message)
            self._known[part.recipe] = failure
            run.waiting.clear()
        yield Ended(run, stage, failure=failure)

    def _label(self, run: Run, stage: str) -> str:
        return (run.config.folder / stage).relative_to(self._bars.folder).as_posix()

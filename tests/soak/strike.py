"""One fault on a pipeline: the moment, the blow, and how long it took until the stages went on."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launch.testbed import Testbed
from rlhf.errors import UserError
from tests.faults.runs import checkpoints, newest_checkpoint
from tests.soak import progress
from tests.soak.progress import Rank
from tests.soak.run import Pipeline, Trouble
from tests.soak.schedule import OF_A_NODE, WITH_ANOTHER_DRIVER, Fault, Kind

SHORT_CUT_S = 5.0
ENDS_S = 120.0  # after SIGTERM: the step under way and a checkpoint
STOPPED = 128 + signal.SIGTERM
HEAD = 1


@dataclass(frozen=True)
class Row:
    """What is known of a fault when it is over."""

    fault: Fault
    where: str
    at_s: float = 0.0  # since the run began
    noticed_s: float | None = None
    went_on_s: float | None = None
    repeated: int = 0  # steps
    trouble: str = ""


@dataclass(frozen=True)
class Blow:
    """A fault that is about to strike."""

    fault: Fault
    pipeline: Pipeline
    victim: Rank
    stages: list[str]  # those that it strikes
    reached: dict[str, int]  # how far they had come

    def look(self) -> None:
        """Again, when the last of the processes that were struck has ended."""
        self.reached.update({stage: progress.steps_done(self.pipeline.folder / stage) for stage in self.stages})


def strike(fault: Fault, pipeline: Pipeline, before: dict[str, int]) -> Row:
    """Waits for progress since `before`, strikes, and waits until every stage that was struck has gone on.

    Brings `before` up to date.
    """
    run = pipeline.folder
    pipeline.wait_for(lambda: _may_strike(fault, run, before), "a new checkpoint in every stage that runs")
    time.sleep(fault.after_s)
    blow = pipeline.wait_for(lambda: _aim(fault, pipeline), "a rank that can be struck")
    row, began = Row(fault, _where(blow)), time.time()
    try:
        try:
            noticed = BLOWS[fault.kind](blow)
        finally:
            _repair(fault, pipeline.testbed, blow.victim.node)
        again = began + noticed if noticed is not None else time.time()
        pipeline.wait_for(lambda: all(_went_on(run, blow.stages, again)), "the next step")
        went_on = max(at or 0.0 for at in _went_on(run, blow.stages, again)) - began
    except Trouble as trouble:
        return replace(row, trouble=str(trouble))
    finally:
        before |= {stage: newest_checkpoint(run / stage) for stage in progress.STAGES}
    repeated = sum(progress.steps_repeated(run / stage, blow.reached[stage], again) for stage in blow.stages)
    return replace(row, noticed_s=noticed, went_on_s=went_on, repeated=repeated)


def _went_on(run: Path, stages: Sequence[str], since: float) -> list[float | None]:
    return [progress.went_on_at(run / stage, since) for stage in stages]


def _may_strike(fault: Fault, run: Path, before: dict[str, int]) -> bool:
    stages = progress.running(run)
    return progress.has_new_checkpoints(run, stages, before) and bool(_open_to(fault, run, stages))


def _open_to(fault: Fault, run: Path, stages: Sequence[str]) -> list[str]:
    """The stages that a fault may strike: a checkpoint is damaged only where there is one before it."""
    if fault.kind not in (Kind.TRUNCATED, Kind.FLIPPED):
        return [*stages]
    return [stage for stage in stages if len(checkpoints(run / stage)) > 1]


def _aim(fault: Fault, pipeline: Pipeline) -> Blow | None:
    """None while no rank runs, or none outside of the head for a fault of a node."""
    run = pipeline.folder
    ranks = progress.ranks(run, progress.running(run))
    possible = _open_to(fault, run, [rank.stage for rank in ranks])
    own = [rank for rank in ranks if rank.stage in possible and not (fault.kind in OF_A_NODE and rank.node == HEAD)]
    if not own:
        return None
    victim = own[int(fault.victim * len(own))]
    if fault.kind in WITH_ANOTHER_DRIVER:
        stages = {rank.stage for rank in ranks}
    elif fault.kind in OF_A_NODE:
        stages = {rank.stage for rank in ranks if rank.node == victim.node}
    else:
        stages = {victim.stage}
    reached = {stage: progress.steps_done(run / stage) for stage in stages}
    return Blow(fault, pipeline, victim, sorted(stages), reached)


def _where(blow: Blow) -> str:
    stages = ", ".join(f"{stage} {blow.reached[stage]}" for stage in blow.stages)
    return stages if blow.fault.kind in WITH_ANOTHER_DRIVER else f"{stages}, node{blow.victim.node}"


# --- blows: each returns the seconds until it was noticed, None where nobody has to -------------------------------------


def _signal_worker(number: signal.Signals) -> Callable[[Blow], float | None]:
    def blow(one: Blow) -> float | None:
        command = ["kill", f"-{number.value}", str(one.victim.pid)]
        return _noticed(one, lambda: one.pipeline.testbed.run(one.victim.node, command))

    return blow


def _noticed(blow: Blow, act: Callable[[], object]) -> float:
    """Seconds until the driver starts a group anew in all stages that were struck."""
    run = blow.pipeline.folder
    restarts = {stage: progress.restarts(run, stage) for stage in blow.stages}
    began = time.monotonic()
    act()
    blow.pipeline.wait_for(
        lambda: all(
            progress.is_complete(run / stage) or progress.restarts(run, stage) > count
            for stage, count in restarts.items()
        ),
        "the driver to notice it",
    )
    noticed = time.monotonic() - began
    blow.look()
    return noticed


def _kill_driver(blow: Blow) -> None:
    blow.pipeline.kill()
    blow.look()
    blow.pipeline.start()


def _end_driver(blow: Blow) -> float:
    began = time.monotonic()
    blow.pipeline.signal(signal.SIGTERM)
    code = blow.pipeline.ended(ENDS_S)
    took = time.monotonic() - began
    if code != STOPPED:
        raise Trouble(f"SIGTERM ended it with exit code {code}: {blow.pipeline.last_line()}")
    blow.look()
    blow.pipeline.start()
    return took


def _cut_for_a_while(blow: Blow) -> None:
    blow.pipeline.testbed.cut(blow.victim.node)
    time.sleep(SHORT_CUT_S)
    blow.pipeline.testbed.heal(blow.victim.node)


def _cut(blow: Blow) -> float:
    return _noticed(blow, lambda: blow.pipeline.testbed.cut(blow.victim.node))


def _kill_ray(blow: Blow) -> float:
    (*_, raylet) = blow.pipeline.testbed.processes(blow.victim.node, "raylet/raylet")
    return _noticed(blow, raylet.kill)


def _kill_node(blow: Blow) -> float:
    return _noticed(blow, lambda: blow.pipeline.testbed.kill(blow.victim.node))


def _damage(truncates: bool) -> Callable[[Blow], None]:
    def blow(one: Blow) -> None:
        one.pipeline.kill()
        one.look()
        found = checkpoints(one.pipeline.folder / one.victim.stage)
        if len(found) < 2:
            raise Trouble(f"{one.victim.stage} has {len(found)} complete checkpoints after its driver was killed")
        damage(found[-1], one.fault.place, truncates)
        one.pipeline.start()

    return blow


def damage(checkpoint: Path, place: float, truncates: bool) -> Path:
    """Shortens a file of a checkpoint or changes a byte, as `place` says, and returns it."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    scaled = place * len(files)
    path = files[int(scaled)]
    content = bytearray(path.read_bytes())
    at = int((scaled - int(scaled)) * len(content))
    if truncates:
        del content[at:]
    else:
        content[at] ^= 0xFF
    path.write_bytes(content)
    return path


BLOWS: dict[Kind, Callable[[Blow], float | None]] = {
    Kind.KILL: _signal_worker(signal.SIGKILL),
    Kind.STOP: _signal_worker(signal.SIGSTOP),
    Kind.DRIVER: _kill_driver,
    Kind.TERM: _end_driver,
    Kind.SHORT_CUT: _cut_for_a_while,
    Kind.CUT: _cut,
    Kind.RAY: _kill_ray,
    Kind.NODE: _kill_node,
    Kind.TRUNCATED: _damage(truncates=True),
    Kind.FLIPPED: _damage(truncates=False),
}


def _repair(fault: Fault, testbed: Testbed, node: int) -> None:
    """A node that Ray has given up comes back by a new start of Ray, as whoever runs a cluster gives it."""
    if fault.kind is Kind.NODE:
        with suppress(UserError):  # it is still running
            testbed.start(node)
    elif fault.kind in (Kind.CUT, Kind.RAY):
        testbed.heal(node)
        testbed.run(node, [str(Path(sys.executable).with_name("ray")), "stop", "--force"])
        testbed.start_ray(node)

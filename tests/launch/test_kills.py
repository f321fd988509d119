"""A worker killed or stopped in every stage and phase, and the driver: the end is that of a run without faults, bit by bit.

`pytest -s -m proof tests/launch/test_kills.py` prints the seconds that stand in docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.ppo.step_profiler import PHASES
from rlhf.tracking import read_metrics
from tests.faults.runs import SMOKE, newest_checkpoint, pid_of, rlhf, steps

pytestmark = [pytest.mark.proof, pytest.mark.timeout(7200)]

OWN = [
    *("run", str(SMOKE), "--tracking.uri", "null"),
    *("--sft.packing", "false", "--sft.epochs", "4", "--sft.checkpoints", "15"),
    *("--reward.epochs", "6", "--reward.checkpoints", "7", "--ppo.iterations", "9"),
]
STAGES = ("sft", "reward/helpfulness", "reward/safety", "ppo")
When = Callable[[Path], bool]
Process = subprocess.Popen[str]


def opening(stage: Path) -> bool:
    return pid_of(stage, 0) > 0 and not (stage / "checkpoints").exists()


def steps_done(stage: Path) -> list[int]:
    return steps(stage) if (stage / "metrics.jsonl").exists() else []


def after(step: int) -> When:
    return lambda stage: max(steps_done(stage), default=0) >= step


def writes_checkpoint(step: int) -> When:
    """While a checkpoint after `step` is not complete."""

    def is_writing(stage: Path) -> bool:
        late = [path for path in stage.glob("checkpoints/*-*") if int(path.name.rpartition("-")[2]) > step]
        return any(not (path / "state.json").exists() for path in late)

    return is_writing


def writes_artifact(stage: Path) -> bool:
    return (stage / "artifact.partial").exists() or (stage / "artifact").exists()


def in_phase(phase: str, iteration: int) -> When:
    """In the middle of a phase of PPO, by the seconds that the phases of the iteration before took."""

    def is_there(stage: Path) -> bool:
        if not after(iteration)(stage):
            return False
        took = {name: read_metrics(stage)[f"perf/seconds_{name}"][-1][1] for name in PHASES[:5]}
        time.sleep(sum(took[name] for name in PHASES[: PHASES.index(phase)]) + took[phase] / 2)
        return True

    return is_there


def wait(condition: Callable[[], bool], process: Process, seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.002)


def restarts(stage: Path, run: Path) -> int:
    try:
        return json.loads((run / "status.json").read_text())["stages"][stage.relative_to(run).as_posix()]["restarts"]
    except (OSError, ValueError, KeyError):
        return 0


def strike(fault: tuple[str, str, When, int, signal.Signals], run: Path, process: Process) -> None:
    """Waits for its moment, sends the signal to the rank, waits until the stage has gone on, and says how long it took."""
    name, moment, when, rank, number = fault
    stage = run / name
    wait(lambda: pid_of(stage, rank) > 0 and when(stage), process)
    before, victim, reached = restarts(stage, run), pid_of(stage, rank), max(steps_done(stage), default=0)
    written, start = (stage / "metrics.jsonl").stat().st_size if reached else 0, time.monotonic()
    os.kill(victim, number)
    wait(lambda: restarts(stage, run) > before, process)
    noticed, kept = time.monotonic() - start, newest_checkpoint(stage)
    wait(lambda: goes_on(stage, written), process)
    went_on = time.monotonic() - start
    lost = reached - max(kept, 0)
    print(f"{name} | {moment} | {number.name} | {noticed:.1f} | {went_on:.1f} | {lost} steps", flush=True)


def goes_on(stage: Path, written: int) -> bool:
    """Whether a line of metrics was added, or the artifact is complete."""
    return (stage / "artifact/manifest.json").exists() or (
        (stage / "metrics.jsonl").exists() and (stage / "metrics.jsonl").stat().st_size > written
    )


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
FAULTS = [
    ("sft", "opening", opening, 0, KILL),
    ("sft", "a step", after(20), 1, KILL),
    ("sft", "a checkpoint is written", writes_checkpoint(40), 0, KILL),
    ("sft", "stopped in a step", after(70), 1, STOP),
    ("sft", "the artifact is written", writes_artifact, 0, KILL),
    ("reward/helpfulness", "opening", opening, 0, KILL),
    ("reward/helpfulness", "a step", after(8), 0, KILL),
    ("reward/helpfulness", "the artifact is written", writes_artifact, 0, KILL),
    ("ppo", "opening", opening, 1, KILL),
    ("ppo", "sampling", in_phase("sampling", 2), 1, KILL),
    ("ppo", "update", in_phase("update", 4), 0, KILL),
    ("ppo", "evaluation", in_phase("evaluation", 5), 1, KILL),
    ("ppo", "a checkpoint is written", writes_checkpoint(6), 0, KILL),
    ("ppo", "stopped in the update", in_phase("update", 7), 0, STOP),
    ("ppo", "the artifact is written", writes_artifact, 0, KILL),
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without faults."""
    folder = tmp_path_factory.mktemp("calm")
    process = rlhf(folder, *OWN)
    shown, _ = process.communicate(timeout=2400)
    assert process.returncode == 0, shown
    return folder / "runs/smoke"


def assert_same(run: Path, calm: Path) -> None:
    for stage in STAGES:
        ours, theirs = (load_file(one / stage / "artifact/model.safetensors") for one in (run, calm))
        assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items()), stage


def test_deaths_in_every_stage_and_phase_cost_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    process, run = rlhf(tmp_path, *OWN), tmp_path / "runs/smoke"
    for fault in FAULTS:
        strike(fault, run, process)
    shown, _ = process.communicate(timeout=2400)
    assert process.returncode == 0, shown
    assert shown.count("was killed (signal 9); ") == sum(number == KILL for *_, number in FAULTS)
    assert_same(run, request.getfixturevalue("calm"))


def test_a_driver_killed_in_sft_and_in_ppo_costs_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run = tmp_path / "runs/smoke"
    for name in ("sft", "ppo"):  # a reward model is done before the next driver is there
        process, stage = rlhf(tmp_path, *OWN), run / name
        wait(lambda: newest_checkpoint(stage) > 0, process)  # noqa: B023
        reached, earlier = max(steps_done(stage)), pid_of(stage, 0)
        process.kill()
        process.wait()
        start = time.monotonic()
        process = rlhf(tmp_path, *OWN)
        wait(lambda: pid_of(stage, 0) not in (0, earlier), process)  # noqa: B023
        written = (stage / "metrics.jsonl").stat().st_size
        wait(lambda: goes_on(stage, written), process)  # noqa: B023
        lost = reached - newest_checkpoint(stage)
        print(f"{name} | the driver | SIGKILL | - | {time.monotonic() - start:.1f} | {lost} steps", flush=True)
        process.kill()
        process.wait()
    process = rlhf(tmp_path, *OWN)
    shown, _ = process.communicate(timeout=2400)
    assert process.returncode == 0, shown
    assert_same(run, request.getfixturevalue("calm"))

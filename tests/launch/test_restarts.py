"""A worker group through its life: what is started again and when it ends. Ray is a stand-in that does what a test says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import network, worker_group
from launch.settings import load
from launch.supervision import Ended
from launch.worker_group import WorkerGroup
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import life, stopping

SMOKE = Path(__file__).parents[1] / "smoke.yaml"
KILLED = Ended("gloo", died={1: "The actor died unexpectedly"})


class Ray:
    """Every attempt ends with the next of `outcomes`, as soon as there is one."""

    def __init__(self) -> None:
        self.attempts: list[dict[str, Any]] = []
        self.outcomes: list[Ended | Exception | None] = []
        self.cancelled: list[int] = []
        self.cpus = 2.0

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "head")

    def available_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus - self.attempts[-1]["workers"]}

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus}

    def remote(self, function: Any) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._start))

    def _start(self, payload: dict[str, Any]) -> int:
        self.attempts.append(payload["attempt"] | {"settings": payload["settings"]})
        return len(self.attempts) - 1

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return (references, []) if references[0] < len(self.outcomes) else ([], references)

    def get(self, reference: int) -> Ended | None:
        outcome = self.outcomes[reference]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def cancel(self, reference: int, force: bool) -> None:
        self.cancelled.append(reference)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    stand_in = Ray()
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def freed(monkeypatch: pytest.MonkeyPatch, ray: Ray) -> list[int]:
    """The number of attempts at each look for room that killed ones still hold."""
    looks: list[int] = []
    monkeypatch.setattr(worker_group.attempt, "free_places", lambda: looks.append(len(ray.attempts)))
    return looks


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[the time of the monotonic clock], which a test moves."""
    seconds = [time.monotonic()]
    monkeypatch.setattr(worker_group.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load(SMOKE, ["--runs_dir", str(tmp_path)])


@pytest.fixture
def group(ray: Ray, config: RunConfig) -> WorkerGroup:
    return WorkerGroup(config, "sft", 2)


def checkpoint(config: RunConfig, step: int) -> None:
    folder = config.folder / f"sft/checkpoints/checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").touch()


def passes(group: WorkerGroup, now: list[float], seconds: float) -> None:
    """Time, in which every rank gives signs of life."""
    for path in group._place.glob("rank-*.json"):
        os.utime(path, (now[0], now[0]))
    now[0] += seconds
    assert not group.done(0)


def test_a_group_that_succeeds_is_done(group: WorkerGroup, ray: Ray) -> None:
    assert not group.done(0)
    ray.outcomes = [None]
    assert group.done(0) and group.restarts == 0
    group.result()


def test_each_death_after_a_checkpoint_is_followed_by_a_new_attempt(
    group: WorkerGroup, ray: Ray, config: RunConfig
) -> None:
    for step in (8, 16, 24):
        checkpoint(config, step)
        ray.outcomes.append(KILLED)
        assert not group.done(0)
    assert group.news[-1] == (
        "rank 1 was killed (signal 9); goes on after step 24 (restarts left until the next checkpoint: 0)"
    )
    assert len({one["name"] for one in ray.attempts}) == 4 and group.restarts == 3
    (left,) = (config.folder / "sft/ranks").iterdir()
    assert left.name == ray.attempts[-1]["name"]
    ray.outcomes.append(None)
    assert group.done(0)
    group.result()
    assert {one["workers"] for one in ray.attempts} == {2}


def test_deaths_without_a_checkpoint_between_end_it_with_their_cause(group: WorkerGroup, ray: Ray) -> None:
    ray.outcomes = [KILLED]
    assert not group.done(0) and "starts over, for it has no checkpoint yet" in group.news[0]
    ray.outcomes.append(KILLED)
    assert group.done(0)
    with pytest.raises(UserError, match=r"^rank 1 was killed \(signal 9\)$") as caught:
        group.result()
    assert caught.value.exit_code == 6


def test_a_mistake_and_a_stop_end_it_at_once(group: WorkerGroup, ray: Ray, config: RunConfig) -> None:
    stop = {"message": "stopped by SIGTERM after step 3", "exit_code": 143}
    (config.folder / "sft/failure.json").write_text(json.dumps(stop))
    ray.outcomes = [Ended("whatever Ray says")]
    assert group.done(0)
    with pytest.raises(UserError, match="stopped by SIGTERM after step 3") as caught:
        group.result()
    assert caught.value.is_stop and len(ray.attempts) == 1


def test_room_that_a_killed_attempt_holds_is_freed_until_the_next_one_has_begun(
    now: list[float], group: WorkerGroup, ray: Ray, freed: list[int], config: RunConfig
) -> None:
    now[0] += 10
    assert not group.done(0) and freed == []
    ray.outcomes = [KILLED]
    for _ in range(3):
        now[0] += 4
        assert not group.done(0)
    assert freed == [2, 2]
    for rank in (0, 1):
        life.show(next((config.folder / "sft/ranks").iterdir()), rank)
    now[0] += 4
    assert not group.done(0) and freed == [2, 2]


def test_what_befell_the_task_itself_is_a_death_too(group: WorkerGroup, ray: Ray) -> None:
    ray.outcomes = [RuntimeError("the task\nwas cancelled"), None]
    assert not group.done(0) and group.news[0].startswith("a worker died: was cancelled; ")
    assert group.done(0)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_silent_rank_is_ended_and_the_group_started_again(
    now: list[float], group: WorkerGroup, ray: Ray, sleeper: subprocess.Popen[bytes]
) -> None:
    place = next((group._folder / life.FOLDER).iterdir())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(life.os, "getpid", lambda: sleeper.pid)
        life.show(place, 1)
    assert not group.done(0)
    now[0] += 44
    assert not group.done(0) and sleeper.poll() is None
    assert group.waits_for().startswith("a sign of life of rank 1 on ")
    now[0] += 2
    assert not group.done(0)
    assert sleeper.wait(timeout=10) == -signal.SIGKILL
    now[0] += 21
    assert not group.done(0) and ray.cancelled == [0]  # Ray did not see the death: the whole group is ended
    ray.outcomes = [RuntimeError("cancelled")]
    assert not group.done(0) and "gave no sign of life for 45 s" in group.news[0]
    assert len(ray.attempts) == 2


@pytest.mark.parametrize(("cut_off", "waits"), [("far", (0.1,)), ("elsewhere", (9.9, 0.2))])
def test_silent_ranks_get_time_to_be_back_unless_their_node_is_cut_off(
    now: list[float], group: WorkerGroup, ray: Ray, monkeypatch: pytest.MonkeyPatch, cut_off: str, waits: tuple
) -> None:
    node = network.Node(cut_off, "10.0.0.9", 1, {})
    monkeypatch.setattr(network, "unreachable", lambda: frozenset({node}))
    for rank in (0, 1):
        life.show(group._place, rank)
    far = json.loads((group._place / "rank-1.json").read_text()) | {"place": "another kernel", "host": "far"}
    (group._place / "rank-1.json").write_text(json.dumps(far))
    assert not group.done(0)
    for seconds in (40, 6, *waits):
        assert ray.cancelled == []
        now[0] += seconds
        os.utime(group._place / "rank-0.json", (now[0], now[0]))
        assert not group.done(0)
    assert ray.cancelled == [0]


def test_ranks_that_are_back_or_begin_after_all_are_not_ended(now: list[float], group: WorkerGroup, ray: Ray) -> None:
    life.fetched(group._place)
    assert not group.done(0)
    now[0] += 1201  # time to be placed and to start
    assert not group.done(0)
    for rank in (0, 1):
        life.show(group._place, rank)
    for seconds in (10, 30, 1, 1, 10):
        passes(group, now, seconds)
    far = json.loads((group._place / "rank-1.json").read_text()) | {"place": "another host"}
    (group._place / "rank-1.json").write_text(json.dumps(far))
    for seconds in (0, 46, 5, 30):  # silent once, in between
        now[0] += seconds
        os.utime(group._place / "rank-0.json", (now[0], now[0]))
        if seconds != 46:
            os.utime(group._place / "rank-1.json", (now[0], now[0]))
        assert not group.done(0)
    assert ray.cancelled == [] and len(ray.attempts) == 1 and group.news == []


def test_a_death_of_which_ray_says_nothing_is_named_by_the_driver(
    group: WorkerGroup, ray: Ray, config: RunConfig, sleeper: subprocess.Popen[bytes]
) -> None:
    place = next((config.folder / "sft/ranks").iterdir())
    life.show(place, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(life.os, "getpid", lambda: sleeper.pid)
        life.show(place, 1)
    assert not group.done(0)
    sleeper.kill()
    sleeper.wait()
    assert not group.done(0)
    ray.outcomes = [Ended("At least one of the worker actors failed to initialize.")]
    assert not group.done(0)
    assert group.news[0].startswith(f"rank 1 on {os.uname().nodename} was killed (signal 9); ")


def test_a_restart_waits_for_storage_that_is_away(group: WorkerGroup, ray: Ray) -> None:
    def away(*_: object) -> Path:
        raise OSError(30, "Read-only file system")

    ray.outcomes = [KILLED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_group.life, "begin", away)
        assert not group.done(0) and not group.done(0) and len(ray.attempts) == 1
    assert not group.done(0) and len(ray.attempts) == 2


def test_it_does_not_wait_for_ever(
    now: list[float], group: WorkerGroup, ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> Path:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(worker_group.life, "begin", away)
    ray.outcomes = [KILLED]
    assert not group.done(0)
    now[0] += 601
    assert group.done(0)
    with pytest.raises(UserError, match="could not be written for 600 s: Read-only file system") as caught:
        group.result()
    assert caught.value.exit_code == 5


@pytest.fixture
def smaller(ray: Ray, tmp_path: Path, now: list[float]) -> WorkerGroup:
    """A group of one worker instead of two, because a node stayed away for 30 s."""
    limits = ["--hardware.min_workers", "1", "--hardware.placement_timeout_s", "30"]
    ray.cpus = 1.0
    group = WorkerGroup(load(SMOKE, ["--runs_dir", str(tmp_path), *limits]), "sft", 2)
    now[0] += 29
    assert not group.done(0) and ray.attempts == []
    assert group.waits_for().startswith("room for all of its 2 workers, since ")
    assert group.waits_for().endswith(", 30 s at most")
    now[0] += 2
    assert not group.done(0)
    return group


def test_a_stage_waits_for_a_node_before_it_goes_on_smaller(smaller: WorkerGroup, ray: Ray) -> None:
    (attempt,) = ray.attempts
    assert (attempt["workers"], attempt["settings"]["hardware"]["workers"]) == (1, 1)
    assert attempt["note"] == "goes on with 1 of 2 workers: the cluster has no room for more"
    ray.cpus = 2.0  # the node is back
    ray.outcomes = [KILLED]
    assert not smaller.done(0)
    assert (ray.attempts[1]["workers"], ray.attempts[1]["note"]) == (2, "")


def asked(group: WorkerGroup) -> int:
    """The signal that the ranks of the attempt hear from the driver."""
    stopping.request(0)
    stopping.listen(group._place)
    heard = stopping._signal
    stopping.request(0)
    return heard


def stop(group: WorkerGroup, number: int) -> None:
    """What a rank records that was asked to stop."""
    failure = stopping.stopped(number, "after step 9")
    (group._folder / "failure.json").write_text(
        json.dumps({"message": failure.message, "exit_code": failure.exit_code})
    )


def test_it_grows_when_there_is_room_again_and_only_then(smaller: WorkerGroup, ray: Ray, now: list[float]) -> None:
    passes(smaller, now, 11)
    ray.cpus = 2.0  # the node is back, but the only rank has not begun
    passes(smaller, now, 11)
    assert asked(smaller) == 0
    life.show(smaller._place, 0)
    ray.cpus = 1.0
    passes(smaller, now, 0)
    passes(smaller, now, 11)
    assert asked(smaller) == 0
    ray.cpus = 2.0
    passes(smaller, now, 9)
    assert asked(smaller) == 0
    passes(smaller, now, 2)
    assert asked(smaller) == signal.SIGUSR1
    checkpoint(smaller._config, 9)
    stop(smaller, signal.SIGUSR1)
    ray.outcomes = [Ended("UserError")]
    assert not smaller.done(0)
    assert smaller.news == ["stopped after step 9 to go on with more workers: there is room again"]
    assert [one["workers"] for one in ray.attempts] == [1, 2] and smaller.restarts == 1
    for step in (9, 12):  # it cost no restart, of which there is one
        ray.outcomes.append(KILLED)
        assert smaller.done(0) == (step == 12)


def test_it_grows_as_far_as_there_is_room_without_a_wait_for_more(ray: Ray, tmp_path: Path, now: list[float]) -> None:
    settings = ["--hardware.min_workers", "1", "--hardware.workers", "4", "--sft.micro_batch_size", "1"]
    ray.cpus = 1.0
    group = WorkerGroup(load(SMOKE, ["--runs_dir", str(tmp_path), *settings]), "sft", 4)
    now[0] += 601
    assert not group.done(0)
    ray.cpus = 2.0
    stop(group, signal.SIGUSR1)
    ray.outcomes = [Ended("UserError")]
    assert not group.done(0)
    assert [one["workers"] for one in ray.attempts] == [1, 2]


def test_a_stop_that_meets_the_growth_ends_the_stage(
    smaller: WorkerGroup, ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(smaller._config, 9)
    stop(smaller, signal.SIGUSR1)
    monkeypatch.setattr(worker_group.signals, "pending", lambda: signal.SIGTERM)
    ray.outcomes = [Ended("UserError")]
    assert smaller.done(0) and len(ray.attempts) == 1
    with pytest.raises(UserError, match="stopped by SIGTERM after step 9, with a checkpoint") as caught:
        smaller.result()
    assert caught.value.exit_code == 143


def test_a_lost_node_is_the_cause_of_a_lack_of_room(group: WorkerGroup, ray: Ray) -> None:
    ray.outcomes = [Ended("gloo", died={1: "The actor died because its node has died."})]
    assert not group.done(0)
    ray.outcomes.append(Ended("the cluster had no room for 2 workers", no_room=True))
    assert group.done(0)
    with pytest.raises(UserError) as caught:
        group.result()
    expected = "rank 1 was lost with its node, and then the cluster had no room for 2 workers"
    assert (caught.value.message, caught.value.exit_code) == (expected, 5)

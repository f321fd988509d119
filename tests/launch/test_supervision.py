"""What the driver decides about workers: from files written by hand, with times by hand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import psutil
import pytest

from launch.supervision import Budget, Cause, Ended, Watch, cause, newest_checkpoint
from rlhf.runs import life
from rlhf.runs.claim import place_of_pids

MEMORY = "Lower sft.micro_batch_size, or give more."
ECHO = {"message": "RuntimeError: [gloo] Connection closed by peer", "exit_code": 1, "dead": []}


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """Of two ranks, on the hosts `one` and `two`."""
    folder = life.begin(tmp_path / "sft", "attempt-1")
    for rank, host in enumerate(("one", "two")):
        own = {"rank": rank, "host": host, "place": "elsewhere", "pid": 7, "started": 0.0}
        (folder / f"rank-{rank}.json").write_text(json.dumps(own))
    return folder


def judged(attempt: Path, ended: Ended, noted: dict | None = None, given_up: tuple[int, ...] = ()) -> Cause:
    stage = attempt.parents[1]
    if noted is not None:
        (stage / "failure.json").write_text(json.dumps(noted))
    return cause(stage, attempt, ended, given_up, MEMORY)


def test_the_first_death_is_the_cause_and_not_its_echo(attempt: Path) -> None:
    found = judged(attempt, Ended("gloo", died={1: "The actor died unexpectedly before finishing this task."}), ECHO)
    assert found.error.message == "rank 1 on two was killed (signal 9)"
    assert found.error.exit_code == 6 and found.can_restart


def test_a_death_that_only_the_other_rank_saw_is_the_cause_too(attempt: Path) -> None:
    found = judged(attempt, Ended("gloo"), ECHO | {"dead": [1]})
    assert found.error.message == "rank 1 on two was killed (signal 9)"


def test_an_error_without_a_death_is_the_cause(attempt: Path) -> None:
    found = judged(attempt, Ended("Ray says so"), ECHO)
    assert (found.error.message, found.error.exit_code, found.can_restart) == (ECHO["message"], 1, True)


def test_a_mistake_of_the_user_is_not_tried_again(attempt: Path) -> None:
    found = judged(attempt, Ended("", died={0: "killed"}), {"message": "bad row", "exit_code": 3})
    assert (found.error.message, found.error.exit_code, found.can_restart) == ("bad row", 3, False)


def test_a_crash_is_told_from_a_kill_by_the_end_of_the_log(attempt: Path) -> None:
    log = attempt.parents[1] / "logs/rank-1.log"
    log.parent.mkdir()
    mark = "--- the stage starts on this rank ---\n"
    log.write_text(f"{mark}Fatal Python error: Bus error\n\nThread 0x7f\n{mark}loss 1.0\n")
    assert "was killed (signal 9)" in judged(attempt, Ended("", died={1: ""})).error.message  # that was an earlier one
    log.write_text(f"{mark}loss 1.0\nFatal Python error: Segmentation fault\n\nThread 0x7f\n")
    assert judged(attempt, Ended("", died={1: ""})).error.message == "rank 1 on two crashed (Segmentation fault)"


def test_a_lost_node_and_a_silent_rank_are_named(attempt: Path) -> None:
    lost = judged(attempt, Ended("", died={0: "The actor died because its node has died. Node Id: 12"}))
    assert lost.error.message == "rank 0 on one was lost with its node"
    silent = judged(attempt, Ended("", died={1: ""}), ECHO, given_up=(1,))
    assert silent.error.message == "rank 1 on two gave no sign of life for 45 s: stopped, or cut off"
    assert silent.error.exit_code == 6 and silent.can_restart
    late = judged(attempt, Ended("", died={1: ""}), given_up=(2, 3))
    assert late.error.message.startswith("rank 2, rank 3 did not start in time (hardware.placement_timeout_s)")


@pytest.mark.parametrize(
    "text", ["Task was killed due to the node running low on memory. OutOfMemoryError", "out of memory\n"]
)
def test_no_memory_names_the_setting_to_lower(attempt: Path, text: str) -> None:
    found = judged(attempt, Ended(text, died={1: ""}), ECHO)
    assert found.error.exit_code == 5 and found.error.message.endswith(MEMORY)


def test_no_room_is_the_clusters_and_is_not_tried_again(attempt: Path) -> None:
    found = judged(attempt, Ended("the cluster had no room", no_room=True))
    assert (found.error.exit_code, found.can_restart) == (5, False)


def test_a_full_disk_is_not_tried_again(attempt: Path) -> None:
    found = judged(attempt, Ended("SafetensorError: I/O error: No space left on device (os error 28)", died={1: ""}))
    assert (found.error.exit_code, found.can_restart) == (5, False) and "full" in found.error.message


def test_every_checkpoint_refills_the_budget() -> None:
    budget = Budget(1)
    assert [budget.allows(step) for step in (-1, 8, 8)] == [True, True, False]
    budget = Budget(2)
    assert [budget.allows(step) for step in (-1, -1, -1)] == [True, True, False]
    assert not Budget(0).allows(5)


def test_the_newest_checkpoint_is_a_complete_and_undamaged_one(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) == -1
    for name in ("checkpoint-9", "checkpoint-10", "damaged-checkpoint-12"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.json").touch()
    (tmp_path / "checkpoints/checkpoint-11").mkdir()
    assert newest_checkpoint(tmp_path) == 10


def touch(attempt: Path, rank: int, beat: float) -> None:
    os.utime(attempt / f"rank-{rank}.json", (beat, beat))


def test_a_silent_rank_is_named_after_15_s_and_late_after_45(attempt: Path) -> None:
    watch = Watch(attempt, 2, now=0.0)
    for now in range(0, 60, 5):
        touch(attempt, 0, 1000.0 + now)  # the clock of another host
        watch.look(float(now))
        assert [*watch.silent(now)] == ([1] if now > 45 else [])
        expected = "a sign of life of rank 1 on two, since " if now > 15 else ""
        assert watch.waits_for(now, 600).startswith(expected) and bool(watch.waits_for(now, 600)) == bool(expected)
    touch(attempt, 1, 2000.0)  # it is back
    watch.look(60.0)
    assert watch.silent(60.0) == {}


def test_a_rank_that_has_ended_its_work_is_not_waited_for(attempt: Path) -> None:
    watch = Watch(attempt, 2, now=0.0)
    watch.look(1.0)
    (attempt / "rank-1.json").unlink()
    watch.look(2.0)
    assert [*watch.silent(100.0)] == [0] and watch.missing() == []


def test_a_rank_on_a_node_that_is_cut_off_is_silent_although_it_reaches_the_storage(attempt: Path) -> None:
    watch = Watch(attempt, 2, now=0.0)
    for now in range(0, 90, 5):
        for rank in (0, 1):
            touch(attempt, rank, 1000.0 + now)
        watch.look(float(now), unreachable={"two"} if now >= 30 else ())
        assert [*watch.silent(now)] == ([1] if now > 25 + 45 else [])
    touch(attempt, 1, 2000.0)  # its cable is back
    watch.look(90.0)
    assert watch.silent(90.0) == {}


def test_nobody_is_silent_while_the_storage_cannot_be_written(attempt: Path) -> None:
    watch = Watch(attempt, 2, now=0.0)
    for now in range(0, 200, 5):
        watch.look(float(now), storage_fault="Read-only file system")
    assert watch.silent(200.0) == {}


def test_ranks_that_have_not_begun_are_named(tmp_path: Path, attempt: Path) -> None:
    begun = time.monotonic()
    folder = life.begin(tmp_path / "ppo", "attempt-1")
    watch = Watch(folder, 2, begun)
    watch.look(begun + 9000)
    assert watch.missing() == [0, 1] and watch.overdue(begun + 9000, 600) == []  # a large model takes long to download
    assert watch.waits_for(begun + 9000, 600).startswith("its base model on every node, since ")
    life.fetched(folder)
    watch.look(begun + 9001)
    assert watch.waits_for(begun + 9002, 600).startswith("its 2 workers to be placed and to start, since ")
    assert watch.overdue(begun + 9600, 600) == [] and watch.overdue(begun + 9602, 600) == [0, 1]
    half = Watch(attempt, 3, now=0.0)
    half.look(1.0)
    assert half.missing() == [2] and half.waits_for(1.0, 600).startswith("rank 2 to start, since ")
    assert half.waits_for(1.0, 600).endswith("600 s at most")


def test_a_new_attempt_gives_the_ranks_of_the_earlier_one_up(tmp_path: Path) -> None:
    first = life.show(life.begin(tmp_path, "attempt-1"), 0)
    second = life.show(life.begin(tmp_path, "attempt-2"), 0)
    assert not first.exists() and second.exists()
    (own,) = life.read(second.parent).values()
    assert (own.pid, own.place, own.is_here, own.is_gone) == (os.getpid(), place_of_pids(), True, False)
    assert own.started == psutil.Process().create_time()

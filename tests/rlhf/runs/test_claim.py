"""Who may write to a run's folder. Other drivers are real processes, or a claim written by hand as another host's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf.errors import UserError
from rlhf.runs import claim

HOLD = """
import sys, time
from pathlib import Path
from rlhf.runs import claim
with claim.hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def other_driver(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def foreign_claim(folder: Path, age_s: float, pid: int = 1) -> Path:
    """The claim of a driver on another host, last touched `age_s` seconds ago."""
    path = folder / "driver.json"
    owner = {"key": "theirs", "host": "far", "place": "another kernel", "pid": pid, "started": 0.0}
    path.write_text(json.dumps(owner))
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def test_a_second_driver_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    first = other_driver(tmp_path)
    try:
        with pytest.raises(UserError, match=f"process {first.pid} on ") as caught, claim.hold(tmp_path):
            pass
    finally:
        first.kill()
        first.wait()
    started = time.strftime("%Y-%m-%d", time.localtime())
    assert os.uname().nodename in caught.value.message and f"started {started}" in caught.value.message
    assert caught.value.exit_code == 2


def test_a_driver_that_was_killed_is_replaced_at_once(tmp_path: Path) -> None:
    first = other_driver(tmp_path)
    first.kill()
    first.wait()
    with claim.hold(tmp_path):
        assert json.loads((tmp_path / "driver.json").read_text())["pid"] == os.getpid()
    assert [*tmp_path.iterdir()] == []


def test_the_number_of_a_dead_driver_may_belong_to_another_process_now(tmp_path: Path) -> None:
    with claim.hold(tmp_path):
        content = json.loads((tmp_path / "driver.json").read_text())
    (tmp_path / "driver.json").write_text(json.dumps(content | {"key": "earlier", "started": content["started"] - 99}))
    with claim.hold(tmp_path) as key:
        assert key != "earlier"


@pytest.mark.parametrize(("age_s", "taken"), [(30, False), (90, True)])
def test_a_driver_on_another_host_counts_while_it_beats(tmp_path: Path, age_s: float, taken: bool) -> None:
    foreign_claim(tmp_path, age_s, pid=os.getpid())
    if not taken:
        with pytest.raises(UserError, match="on far"), claim.hold(tmp_path):
            pass
        return
    with claim.hold(tmp_path) as key:
        assert json.loads((tmp_path / "driver.json").read_text())["key"] == key


def test_a_claim_that_is_being_written_counts(tmp_path: Path) -> None:
    (tmp_path / "driver.json").touch()
    with pytest.raises(UserError, match="just starting"), claim.hold(tmp_path):
        pass


def test_of_many_drivers_that_find_a_stale_claim_one_gets_the_folder(tmp_path: Path) -> None:
    foreign_claim(tmp_path, 90)
    script = HOLD.replace("time.sleep(60)", "time.sleep(4)")
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    held = [process.communicate(timeout=60)[0] == b"held\n" for process in started]
    assert held.count(True) == 1


def test_the_claim_of_a_driver_that_was_quicker_stays(tmp_path: Path) -> None:
    path = foreign_claim(tmp_path, 90)
    stale, _ = claim._read(path)
    assert stale is not None
    path.write_text(path.read_text().replace(stale.key, "quicker"))
    claim._remove(path, stale)
    assert [file.name for file in tmp_path.iterdir()] == ["driver.json"] and "quicker" in path.read_text()


def test_the_claim_is_touched_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.02)
    with claim.hold(tmp_path):
        os.utime(tmp_path / "driver.json", (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / "driver.json").stat().st_mtime < time.time() - 100:
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_worker_notices_another_driver_at_once_and_a_silent_one_after_a_minute(tmp_path: Path) -> None:
    path = foreign_claim(tmp_path, 0)
    start = time.monotonic()
    worker = claim.Follower(path, "theirs")
    assert worker.lost(start) == worker.lost(start + 59) == ""
    os.utime(path, (5, 5))  # it beats, by whatever clock
    assert worker.lost(start + 80) == worker.lost(start + 139) == ""
    assert "is gone: no sign of life for 61 s" in worker.lost(start + 141)
    path.write_text(path.read_text().replace("theirs", "another"))
    assert worker.lost(start + 81).endswith("was taken over by process 1 on far, started 1970-01-01 00:00:00")


def test_a_rank_whose_attempt_was_given_up_stops(tmp_path: Path) -> None:
    path, life = foreign_claim(tmp_path, 0), tmp_path / "rank-0.json"
    life.touch()
    rank = claim.Follower(path, "theirs", life)
    os.utime(life, (5, 5))
    rank.require()
    assert life.stat().st_mtime > 5  # it shows that it lives
    life.unlink()
    with pytest.raises(claim.TakenOver, match="its worker group was given up"):
        rank.require()
    assert not life.exists()


def test_a_rank_that_has_ended_its_work_is_not_given_up(tmp_path: Path) -> None:
    path, life = foreign_claim(tmp_path, 0), tmp_path / "rank-0.json"
    life.touch()
    rank = claim.Follower(path, "theirs", life)
    rank.end_life()
    assert not life.exists()
    rank.require()
    assert rank.lost() == ""


def test_a_driver_is_not_gone_because_the_storage_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, life = foreign_claim(tmp_path, 0), tmp_path / "rank-0.json"
    life.touch()
    rank, now = claim.Follower(path, "theirs", life), time.monotonic()

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(claim.os, "utime", read_only)
    for seconds in (1, 40, 80, 120):
        rank.show_life()
        assert rank.lost(now + seconds) == ""
    monkeypatch.undo()
    rank.show_life()
    assert "no sign of life for 61 s" in rank.lost(now + 181)


def test_what_was_taken_over_is_not_written(tmp_path: Path) -> None:
    with claim.hold(tmp_path):
        claim.require()
        foreign_claim(tmp_path, 0)
        with pytest.raises(claim.TakenOver, match="taken over by process 1 on far") as caught:
            claim.require()
    assert caught.value.exit_code == 6
    assert (tmp_path / "driver.json").exists()  # theirs
    claim.require()  # this process works for no run now


def test_a_process_is_told_from_another_with_its_number() -> None:
    own = psutil.Process()
    assert claim.is_alive(own.pid, own.create_time())
    assert not claim.is_alive(own.pid, own.create_time() - 10)


def test_a_worker_is_asked_to_stop_in_its_attempt_and_before_that_in_its_run(tmp_path: Path) -> None:
    attempt = tmp_path / "sft/ranks/attempt-1"
    worker = claim.Follower(tmp_path / claim.CLAIM, "ours", attempt / "rank-0.json")
    driver = claim.Follower(tmp_path / claim.CLAIM, "ours")
    assert (worker.asking(), driver.asking()) == ([attempt, tmp_path], [tmp_path])

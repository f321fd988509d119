"""The pure parts of the soak: its schedule, what it reads of a run, what it compares, what it writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.soak import progress
from tests.soak.comparison import differences
from tests.soak.schedule import DECK, LATEST_S, Fault, Kind, schedule, settings
from tests.soak.strike import Row, damage
from tests.soak.table import page


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_seed_gives_one_schedule_and_another_seed_another_one() -> None:
    assert schedule(50, 7) == schedule(50, 7) != schedule(50, 8)


def test_a_shorter_schedule_is_the_beginning_of_a_longer_one() -> None:
    assert schedule(60, 3)[:20] == schedule(20, 3)


def test_fifty_faults_have_every_kind_as_often_as_the_deck_says() -> None:
    faults = schedule(50, 1)
    assert Counter(fault.kind for fault in faults) == DECK and {*DECK} == {*Kind}
    assert [fault.number for fault in faults] == list(range(1, 51))
    assert all(0 <= fault.after_s < LATEST_S and 0 <= fault.victim < 1 and 0 <= fault.place < 1 for fault in faults)


@pytest.mark.parametrize("faults", [3, 50])
def test_there_are_more_checkpoints_than_faults(faults: int) -> None:
    given = settings(faults)
    values = dict(zip(given[::2], given[1::2], strict=True))
    counts = [int(values[f"--{name}"]) for name in ("sft.checkpoints", "reward.checkpoints")]
    counts += [int(values["--ppo.iterations"]) // int(values["--ppo.checkpoint_every"])]
    assert sum(counts) > 1.5 * faults
    assert int(values["--sft.epochs"]) * 128 / 4 > counts[0]  # rows by batch size of tests/smoke.yaml
    assert int(values["--reward.epochs"]) * 128 / 32 > counts[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """SFT is complete; both reward models run, one on each of two nodes."""
    write(tmp_path / "sft/artifact/manifest.json", {})
    for number, name in enumerate(("helpfulness", "safety"), 2):
        rank = {"rank": 0, "host": f"node{number}", "place": "here", "pid": 70 + number, "started": 1.0}
        write(tmp_path / f"reward/{name}/ranks/attempt-1/rank-0.json", rank)
    write(tmp_path / "reward/safety/checkpoints/checkpoint-4/state.json", {})
    write(tmp_path / "reward/safety/checkpoints/checkpoint-6/weights", "half")
    stages = {"reward/safety": {"state": "running", "waits_for": "", "restarts": 2}}
    write(tmp_path / "status.json", {"stages": stages, "ended": None, "driver": {"host": "node1", "pid": 9}})
    return tmp_path


def test_what_runs_and_where(run: Path) -> None:
    assert progress.running(run) == ["reward/helpfulness", "reward/safety"]
    found = progress.ranks(run, ["reward/safety", "reward/helpfulness"])
    assert found == [progress.Rank("reward/helpfulness", 0, 2, 72), progress.Rank("reward/safety", 0, 3, 73)]
    assert progress.restarts(run, "reward/safety") == 2 and progress.restarts(run, "ppo") == 0


def test_a_fault_waits_for_a_new_checkpoint_in_every_stage_that_runs(run: Path) -> None:
    both = ["reward/helpfulness", "reward/safety"]
    assert not progress.has_new_checkpoints(run, both, {})  # the first has none
    assert not progress.has_new_checkpoints(run, [], {})  # between two stages
    assert progress.has_new_checkpoints(run, both[1:], {"reward/safety": 2})
    assert not progress.has_new_checkpoints(run, both[1:], {"reward/safety": 4})  # that after step 6 is not complete


def test_steps_that_were_done_again_are_counted_from_the_first_one_after_the_fault(run: Path) -> None:
    """The stage had come to step 9 when it was struck at 100.0, and goes on after its checkpoint of step 6."""
    stage = run / "reward/safety"
    lines = [{"time": 90.0 + step, "step": step, "loss": 1.0} for step in range(1, 7)]
    write(stage / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    assert progress.went_on_at(stage, 100.0) is None and progress.steps_done(stage) == 6
    lines += [{"time": 130.0, "step": 7, "loss": 1.0}, {"time": 131.0, "step": 8, "loss": 1.0}]
    write(stage / "metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines) + '{"time": 132.0, "st')
    assert progress.went_on_at(stage, 100.0) == 130.0
    assert progress.steps_repeated(stage, 9, 100.0) == 3  # 7, 8 and 9
    assert progress.steps_repeated(stage, 6, 100.0) == 0
    assert progress.steps_repeated(run / "sft", 9, 100.0) == 0
    assert progress.went_on_at(run / "sft", 100.0) == (run / "sft/artifact/manifest.json").stat().st_mtime


def finished(folder: Path, loss: float = 0.5, weights: str = "weights", seconds: float = 1.0) -> Path:
    write(folder / "sft/artifact/model.safetensors", weights)
    write(folder / "sft/artifact/manifest.json", {"digest": "d", "code_revision": str(seconds)})
    lines = [{"time": seconds, "step": 1, "sft/loss": 0.7}, {"time": seconds, "step": 1, "sft/loss": loss}]
    lines += [{"time": seconds, "step": 2, "sft/kl": float("nan"), "perf/seconds": seconds, "sft/lr": None}]
    write(folder / "sft/metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def test_runs_are_equal_whatever_time_they_took(tmp_path: Path) -> None:
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", seconds=2.0)
    assert differences(one, other, ["sft"]) == []


def test_a_difference_is_named(tmp_path: Path) -> None:
    one, other = finished(tmp_path / "one"), finished(tmp_path / "other", loss=0.5 + 1e-15, weights="weightz")
    write(other / "sft/artifact/more.json", "")
    assert differences(one, other, ["sft"]) == [
        "sft/artifact/model.safetensors",
        "sft/artifact/more.json",
        "sft: sft/loss from step 1, 1 of 1 steps",
    ]


@pytest.mark.parametrize(
    ("place", "truncates", "left", "bytes_left"),
    [(0.75, True, b"12", 6), (0.75, False, b"12\xcc45", 9), (0, True, b"", 5)],
)
def test_a_checkpoint_is_damaged_where_the_schedule_says(
    tmp_path: Path, place: float, truncates: bool, left: bytes, bytes_left: int
) -> None:
    for name, content in (("one", "12345"), ("deep/two", "6789"), ("empty", "")):
        write(tmp_path / name, content)
    path = damage(tmp_path, place, truncates)
    assert path.read_bytes() == left
    assert sum(one.stat().st_size for one in tmp_path.rglob("*") if one.is_file()) == bytes_left


def test_the_page_has_a_row_for_every_fault_and_one_for_every_kind() -> None:
    rows = [
        Row(Fault(1, Kind.KILL, 0, 0, 0), "sft 12, node2", 61.0, 1.5, 20.0, 4),
        Row(Fault(2, Kind.KILL, 0, 0, 0), "ppo 3, node1", 100.0, 2.5, 30.0, 1),
        Row(Fault(3, Kind.SHORT_CUT, 0, 0, 0), "ppo 5, node3", 130.0, None, 7.0, 0),
        Row(Fault(4, Kind.DRIVER, 0, 0, 0), "ppo 7", 170.0, trouble="exit code 1: a | b"),
    ]
    text = page("make soak", rows, ["all is well"])
    assert "| worker killed | 2 | 2.0 s (1.5–2.5) | 25.0 s (20.0–30.0) | 1–4 |" in text
    assert "| node cut off for 5 s | 1 | – | 7.0 s | 0–0 |" in text
    assert "| 1 | 1:01 | worker killed | sft 12, node2 | 1.5 s | 20.0 s | 4 |" in text
    assert "| 4 | 2:50 | driver killed | ppo 7 | exit code 1: a / b | – | – |" in text
    assert "- all is well\n" in text

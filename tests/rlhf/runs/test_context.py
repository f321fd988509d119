"""Progress reaches the driver whole, soon, and only from the writer."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs import context
from rlhf.runs.context import Progress, ProgressState, StageContext, read_progress


@pytest.fixture
def timer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(context.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(context.time, "time", lambda: 1e9 + now[0])
    return now


def test_nothing_is_read_before_the_first_update(tmp_path):
    assert read_progress(tmp_path) is None


def test_an_update_is_read_back(tmp_path, timer):
    Progress(tmp_path / "sft", is_writer=True).update(3, 10, loss=1.25)
    state = ProgressState(done=3, total=10, metrics={"loss": 1.25}, warnings=[], time=1e9 + 100)
    assert read_progress(tmp_path / "sft") == state


def test_quick_updates_are_dropped_until_the_interval_is_over(tmp_path, timer):
    progress = Progress(tmp_path, is_writer=True)
    seen = []
    for step, after in enumerate([0.0, 0.1, 0.3, 0.2]):
        timer[0] += after
        progress.update(step, 10)
        state = read_progress(tmp_path)
        seen.append(state and state.done)
    assert seen == [0, 0, 0, 3]


def test_the_last_update_is_never_dropped(tmp_path, timer):
    progress = Progress(tmp_path, is_writer=True)
    progress.update(9, 10)
    progress.update(10, 10)
    state = read_progress(tmp_path)
    assert state is not None and state.done == 10


def test_a_warning_comes_with_the_next_update_and_stays(tmp_path, timer):
    progress = Progress(tmp_path, is_writer=True)
    progress.update(1, 10)
    progress.warn("too far")
    seen = []
    for step in (2, 3):
        progress.update(step, 10)
        state = read_progress(tmp_path)
        seen.append(state and (state.done, state.warnings))
        timer[0] += 1
    assert seen == [(2, ["too far"]), (3, ["too far"])]


def test_only_the_writer_writes(tmp_path, timer):
    Progress(tmp_path, is_writer=False).update(10, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_is_no_number_leaves_valid_json(tmp_path, timer):
    Progress(tmp_path, is_writer=True).update(1, 2, loss=float("nan"))
    text = (tmp_path / "progress.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"loss": None}


@pytest.mark.parametrize(("rank", "writes"), [(0, True), (1, False)])
def test_the_first_rank_is_the_writer(rank, writes):
    anything: Any = None
    context = StageContext("sft", rank, 2, anything, Path("runs/a/sft"), {}, anything, anything, local=False)
    assert context.is_writer is writes
    assert context.artifact_folder == Path("runs/a/sft/artifact")

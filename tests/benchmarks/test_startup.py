"""A stage really launched, and where its start is said to go."""

import json
import os
import time

import pytest

from benchmarks import startup


@pytest.mark.proof
@pytest.mark.timeout(600)
def test_a_stage_is_launched_and_its_parts_fill_the_time(capsys):
    start = time.perf_counter()
    (result,) = startup.main(["--quick", "--threads", "1", "--stages", "sft", "--repeats", "1"])
    assert 1 < result["total"] < time.perf_counter() - start
    assert all(seconds > 0 for seconds in result["parts"].values())
    assert startup.shown([result]) in capsys.readouterr().out


def test_parts_are_read_from_the_files_of_a_run(tmp_path):
    (tmp_path / "made_by.json").write_text("{}")
    (tmp_path / "logs").mkdir()
    os.utime(tmp_path / "made_by.json", (102, 102))
    os.utime(tmp_path / "logs", (105, 105))
    (tmp_path / "events.jsonl").write_text(json.dumps({"time": 109.0}) + "\n" + json.dumps({"time": 110.0}))
    steps = [{"step": 0, "time": 111.0}, {"step": 1, "time": 114.0}, {"step": 2, "time": 115.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    found = startup.parts(100.0, tmp_path)
    assert found == {"driver": 2.0, "group": 3.0, "import": 4.0, "step": 5.0}

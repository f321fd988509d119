"""Sampling during the update on a random model: that each way does what it says, and what is made of the times."""

import json

from benchmarks import overlap
from rlhf.ppo.step_profiler import PHASES

QUICK = ["--quick", "--threads", "1", "--repeats", "2", "--rows", "8", "--length", "24"]


def test_each_way_overlaps_what_it_says(capsys, tmp_path):
    out = tmp_path / "overlap.json"
    lines = overlap.main([*QUICK, "--workers", "1", "--out", str(out)])
    ((workers, turns),) = json.loads(out.read_text())["results"]["turns"].items()
    assert workers == "1" and [len(of_way) for of_way in turns.values()] == [2, 2]
    for way, of_way in turns.items():
        for one in of_way:
            assert (one["perf/overlapped_seconds_sampling"] > 0) == (way == "one step off-policy")
            assert one["ppo/staleness"] == float(way == "one step off-policy")
            assert one["perf/overlapped_seconds_scoring"] == one["perf/overlapped_seconds_update"] == 0
    assert overlap.shown(lines) in capsys.readouterr().out


def turn(iteration, overlapped=0.0, **seconds):
    times = {f"perf/seconds_{phase}": seconds.get(phase, 0.0) for phase in PHASES}
    times |= {"perf/overlapped_seconds_sampling": overlapped}
    return times | {"perf/seconds_iteration": iteration}


def test_an_iteration_is_held_against_that_of_its_own_turn():
    """The machine was slow in the second turn, for both ways."""
    found = {
        "on-policy": [
            turn(10.0, sampling=4.0, logging=1.0),
            turn(40.0, sampling=8.0),
            turn(11.0, sampling=5.0, other=2.0),
        ],
        "one step off-policy": [turn(8.0, 0.5), turn(30.0, 9.0), turn(9.9, 1.0)],
    }
    plain, other = overlap.summary(2, found)
    assert (plain["iteration"], plain["of_on_policy"], plain["seconds"]["sampling"]) == (11.0, 1.0, 5.0)
    assert (other["iteration"], other["of_on_policy"]) == (9.9, 0.8)
    assert (plain["overlapped"], other["overlapped"]) == (0.0, 1.0)
    assert "| 2 | one step off-policy | 0.00 s |" in overlap.shown([plain, other])

"""Two things at once on a random model: that each way does what it says, and what is made of the times."""

import json

from benchmarks import overlap
from rlhf.ppo.step_profiler import COMPUTING, PHASES

QUICK = ["--quick", "--threads", "1", "--repeats", "2", "--rows", "8", "--length", "24"]


def test_each_way_does_beside_what_it_says(capsys, tmp_path):
    out = tmp_path / "overlap.json"
    lines = overlap.main([*QUICK, "--workers", "1", "--out", str(out)])
    ((workers, turns),) = json.loads(out.read_text())["results"]["turns"].items()
    assert workers == "1" and [len(of_way) for of_way in turns.values()] == [2, 2, 2]
    for way, of_way in turns.items():
        for one in of_way:
            assert (one["perf/overlapped_seconds_scoring"] > 0) == (way == "scoring beside sampling")
            assert (one["perf/overlapped_seconds_sampling"] > 0) == (way == "sampling beside the update")
    assert overlap.shown(lines) in capsys.readouterr().out


def turn(iteration, beside=0.0, **seconds):
    """Of which `beside` in each phase that can be beside another."""
    times = {f"perf/seconds_{phase}": seconds.get(phase, 0.0) for phase in PHASES}
    times |= {f"perf/overlapped_seconds_{phase}": beside for phase in COMPUTING}
    return times | {"perf/seconds_iteration": iteration}


def test_an_iteration_is_held_against_that_of_its_own_turn():
    """The machine was slow in the second turn, for both ways."""
    found = {
        "in turn": [
            turn(10.0, sampling=4.0, logging=1.0),
            turn(40.0, sampling=8.0),
            turn(11.0, sampling=5.0, other=2.0),
        ],
        "scoring beside sampling": [turn(8.0, 0.5), turn(30.0, 9.0), turn(9.9, 1.0)],
    }
    plain, beside = overlap.summary(2, found)
    assert (plain["iteration"], plain["of_in_turn"], plain["seconds"]["sampling"]) == (11.0, 1.0, 5.0)
    assert (beside["iteration"], beside["of_in_turn"]) == (9.9, 0.8)
    assert (plain["beside"], beside["beside"]) == (0.0, 3.0)
    assert "| 2 | scoring beside sampling | 0.00 s |" in overlap.shown([plain, beside])

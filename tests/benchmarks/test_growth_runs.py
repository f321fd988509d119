"""The prediction of growth, worked by hand on a cost model of three numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import growth_runs
from rlhf.planning.machines import Machine


def cost(config: Any, machine: Machine) -> dict[str, float]:
    """12 FLOPs, divided among workers; 3 bytes for each other worker in scoring."""
    workers = config.hardware.workers
    seconds = {phase: 12 / machine.flops / workers for phase in growth_runs.PHASES}
    return seconds | {"scoring": seconds["scoring"] + 3 * (workers - 1) / machine.link_bandwidth}


def test_the_fraction_of_one_node_and_the_network_make_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth_runs, "predicted", cost)
    config_of: Any = {n: SimpleNamespace(hardware=SimpleNamespace(workers=n)) for n in (1, 2, 4)}
    one = {"sync": 4.0, "sampling": 8.0, "scoring": 8.0, "update": 16.0, "flops": 3.0, "bandwidth": 1.0}
    found = {1: one, 2: one | {"scoring": 10.0}, 4: one}
    lines = growth_runs.rows(config_of, found, {2: 0.5, 4: 1.0}, cores=2)
    seconds = {(int(nodes), phase): float(model) for nodes, phase, _, model, _ in lines}
    errors = {(int(nodes), phase): error for nodes, phase, _, _, error in lines}
    assert [seconds[1, phase] for phase in growth_runs.PHASES] == [
        4,
        8,
        8,
        16,
    ]  # 4 s of arithmetic: 1, 2, 2 and 4 times
    assert [seconds[2, phase] for phase in growth_runs.PHASES] == [2, 4, 4 + 6, 8]
    assert [seconds[4, phase] for phase in growth_runs.PHASES] == [2, 4, 4 + 9, 8]  # four workers on two cores
    assert (errors[1, "all"], errors[2, "scoring"], errors[2, "update"]) == ("fitted", "+0%", "-50%")
    assert seconds[2, "all"] == 24 and errors[2, "all"] == f"{24 / 38 - 1:+.0%}"

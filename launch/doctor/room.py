"""Whether the worker groups of a run fit into a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from launch.doctor.result import CheckResult, ok
from launch.elastic import of_each
from rlhf.config import RunConfig
from stages.base import parts_of, stage_of

Resources = Mapping[str, float]


def places(nodes: Sequence[Resources], each: Resources) -> int:
    """How many workers fit that take so much of each resource: a worker lies on one node."""
    taken = {name: amount for name, amount in each.items() if amount}
    return sum(int(min(node.get(name, 0.0) / amount for name, amount in taken.items())) for node in nodes)


def judge(config: RunConfig, nodes: Sequence[Resources]) -> Iterator[CheckResult]:
    each = of_each(config.hardware)
    there = places(nodes, each)
    wanted = {part: stage_of(part).workers(config) for part in parts_of(config)}
    largest = max(wanted.values())
    taken = " and ".join(f"{amount:g} {name}{'s' * (amount != 1)}" for name, amount in each.items() if amount)
    if largest > there:
        text = f"{largest} workers with {taken} each are wanted, and there is room for {there} on {len(nodes)} nodes"
        yield CheckResult("room", "", "failed", text, "add nodes, or lower hardware.workers or what each worker takes")
    else:
        yield ok("room", f"{largest} workers with {taken} each, on {len(nodes)} nodes with room for {there}")

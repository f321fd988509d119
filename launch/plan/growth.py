"""Seconds of an iteration on more and more nodes, and what bounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.plan import tables
from rlhf.config import RunConfig
from rlhf.planning import Machine, ModelShape, cost_of, plan_run

EFFICIENT = 0.5


@dataclass(frozen=True)
class Size:
    """A run on so many nodes; `why`: what is against it, "" if nothing is."""

    nodes: int
    gpus: float
    seconds: float
    moving: float  # seconds in which weights and gradients are under way between GPUs
    longest: str  # phase
    why: str = ""


def size_of(config: RunConfig, shape: ModelShape, machine: Machine, nodes: int) -> Size:
    """Of PPO. The seconds in which data moves are those that a network without limit would save."""
    plan = plan_run(config, shape, machine)
    cost, ideal = (cost_of(config, shape, each, plan.of("ppo")) for each in (machine, machine.with_endless_network()))
    assert cost and ideal, "a machine of configs/machines.yaml has rates"
    why = "" if plan.fits else f"does not fit: {tables.worst(plan)}"
    longest = max(cost.seconds, key=lambda phase: cost.seconds[phase])
    return Size(nodes, cost.gpus, cost.total, cost.total - ideal.total, longest, why)


def table(sizes: Sequence[Size], refused: Sequence[tuple[int, str]]) -> str:
    """`refused`: nodes with which the settings cannot be, and why."""
    head = ["nodes", "GPUs", "seconds", "faster by", "efficiency", "moving", "longest phase"]
    first = smallest(sizes)
    lines = [
        [
            str(size.nodes),
            f"{size.gpus:.0f}",
            f"{size.seconds:.3g}" if size.seconds < 100 else f"{size.seconds:,.0f}",
            *(["", ""] if size.why else [f"{first.seconds / size.seconds:.1f}", f"{efficiency(first, size):.0%}"]),
            f"{size.moving / size.seconds:.0%}",
            size.longest,
        ]
        for size in sizes
    ]
    notes = [f"{size.nodes}: {size.why}" for size in sizes if size.why]
    notes += [f"{nodes}: {why}" for nodes, why in refused]
    return "\n".join([tables.aligned(head, lines), "", *notes, summary(sizes)])


def smallest(sizes: Sequence[Size]) -> Size:
    """With which the others are compared: the first on which the run fits."""
    return next((size for size in sizes if not size.why), sizes[0])


def efficiency(first: Size, size: Size) -> float:
    """How much of the additional GPUs' time is not lost."""
    return first.seconds * first.gpus / (size.seconds * size.gpus)


def summary(sizes: Sequence[Size]) -> str:
    """Where more nodes stop being worth it, and why."""
    first = smallest(sizes)
    if first.why:
        return "it fits on none of them"
    for size in sizes:
        if not size.why and efficiency(first, size) < EFFICIENT:
            bound = "weights and gradients on their way" if 2 * size.moving > size.seconds else size.longest
            return f"{size.nodes} nodes lose more than half of the GPUs' time against {first.nodes}; what bounds them: {bound}"
    return f"{sizes[-1].nodes} nodes lose less than half of the GPUs' time against {first.nodes}"

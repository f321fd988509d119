"""A plan as text: tables of memory by role and phase, and of seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rlhf.planning import Change, Cost, RunPlan, StagePlan
from rlhf.planning.engines import Part
from rlhf.planning.plan import Excess

GIGA = 1e9


def memory(plan: RunPlan, stage: StagePlan) -> str:
    """A line for each role and kind, a column for each phase, in GB; then totals of a device and of a host."""
    names = [phase.name for phase in stage.phases]
    device = _columns([phase.device for phase in stage.phases])
    lines = [[f"{role}: {kind}", *map(_gb, row)] for (role, kind), row in device.items()]
    totals = [phase.device_bytes for phase in stage.phases]
    lines.append([_of_worker(stage, plan), *map(_gb, totals)])
    if not stage.cpu:
        lines.append(["left", *(_gb(plan.device_memory - total) for total in totals)])
    hosts = [stage.host_bytes(phase) for phase in stage.phases]
    shards = " and what they compute on" if stage.cpu else ""
    lines.append([f"a host's processes, files, offloaded parts{shards}", *map(_gb, hosts)])
    lines.append(["left", *(_gb(plan.machine.host_memory - total) for total in hosts)])
    rows = "" if stage.rows is None else f"; the sampler has {stage.rows} rows at once"
    title = f"{stage.stage}, {stage.workers} workers, GB{rows}"
    return aligned([title, *names], lines)


def _of_worker(stage: StagePlan, plan: RunPlan) -> str:
    return "a worker's memory" if stage.cpu else f"a GPU, of {_gb(plan.device_memory)}"


def _columns(phases: Sequence[Iterable[Part]]) -> dict[tuple[str, str], list[float]]:
    """(role, kind) → bytes in each phase, in the order of the first phase that has it."""
    rows: dict[tuple[str, str], list[float]] = {}
    for number, parts in enumerate(phases):
        for part in parts:
            row = rows.setdefault((part.role, part.kind), [0.0] * len(phases))
            row[number] += part.bytes
    last = {("worker", "context"), ("worker", "fragmentation")}
    return dict(sorted(rows.items(), key=lambda item: item[0] in last))


def seconds(costs: Sequence[Cost], price: float | None) -> str:
    """What an iteration or a step takes, and a PPO run."""
    lines = []
    for cost in costs:
        phases = ", ".join(f"{name} {_short(value)}" for name, value in cost.seconds.items())
        line = (
            f"{cost.stage}: {_short(cost.total)} s {'an' if cost.unit == 'iteration' else 'a'} {cost.unit} ({phases})"
        )
        if cost.hours is not None:
            line += f"; {cost.count} of them {_short(cost.hours)} h"
        dollars = None if price is None else cost.dollars(price)
        lines.append(line + (f", {dollars:,.0f} $" if dollars is not None else ""))
    return "\n".join(lines)


def verdict(plan: RunPlan, change: Change | None) -> str:
    if plan.fits:
        return f"fits: {headroom(plan)}"
    excesses = "\n".join(f"  {line(excess)}" for excess in plan.excesses)
    remedy = f"nearest change that fits: {change.line}" if change else "no change of these settings fits"
    return f"does not fit:\n{excesses}\n{remedy}"


def headroom(plan: RunPlan) -> str:
    """The least that is left, on a GPU and on a host."""
    both = [(stage, phase) for stage in plan.stages for phase in stage.phases]
    host = min(both, key=lambda one: plan.machine.host_memory - one[0].host_bytes(one[1]))
    left = plan.machine.host_memory - host[0].host_bytes(host[1])
    parts = [f"a host has at least {_gb(left)} GB left ({host[0].stage}, {host[1].name})"]
    if not host[0].cpu:
        device = max(both, key=lambda one: one[1].device_bytes)
        left = plan.device_memory - device[1].device_bytes
        parts.insert(0, f"a GPU has at least {_gb(left)} GB left ({device[0].stage}, {device[1].name})")
    return ", ".join(parts)


def worst(plan: RunPlan) -> str:
    """The excess that is the largest fraction of what there is."""
    return line(max(plan.excesses, key=lambda excess: excess.needed / excess.there))


def line(excess: Excess) -> str:
    what = "a GPU" if excess.where == "device" else "a host"
    return (
        f"{excess.stage}, {excess.phase}: {what} needs {_gb(excess.needed)} GB and has {_gb(excess.there)}; "
        f"most of it: {excess.largest}"
    )


def as_json(plan: RunPlan, costs: Sequence[Cost], change: Change | None) -> dict:
    stages = [
        {
            "stage": stage.stage,
            "workers": stage.workers,
            "rows": stage.rows,
            "phases": {
                phase.name: {
                    "device": [vars(part) for part in phase.device],
                    "host": [vars(part) for part in phase.host],
                    "device_bytes": phase.device_bytes,
                    "host_bytes": stage.host_bytes(phase),
                }
                for phase in stage.phases
            },
        }
        for stage in plan.stages
    ]
    found: Mapping = {
        "machine": vars(plan.machine),
        "nodes": plan.nodes,
        "fits": plan.fits,
        "excesses": [vars(excess) for excess in plan.excesses],
        "change": None if change is None else change.line,
        "stages": stages,
        "seconds": {cost.stage: cost.seconds for cost in costs},
    }
    return dict(found)


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *lines)) for column in range(len(head))]
    shown = [
        row[0].ljust(widths[0])
        + "".join(f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in (head, *lines)
    ]
    return "\n".join(shown)


def _gb(count: float) -> str:
    """Three digits where the number is small."""
    value = count / GIGA
    return "" if not count else f"{value:.1f}" if abs(value) >= 0.05 else f"{value:.2g}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

"""The plan of a run: every phase of every stage, and what does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rlhf.config import RunConfig
from rlhf.planning import supervised
from rlhf.planning.engines import Part, layout_of
from rlhf.planning.machines import Machine
from rlhf.planning.phases import Phase, PPOPhases
from rlhf.planning.shapes import ModelShape

PLANNED = ("sft", "reward", "dpo", "ppo")


@dataclass(frozen=True)
class StagePlan:
    stage: str
    workers: int
    local: int  # workers of one node, of all parts that run side by side
    phases: list[Phase]
    rows: int | None = None  # that the sampler has at once
    cpu: bool = False

    def host_bytes(self, phase: Phase) -> float:
        """Of a node; where workers compute on CPUs, with what they compute on."""
        return phase.host_bytes + (self.local * phase.device_bytes if self.cpu else 0.0)


@dataclass(frozen=True)
class Excess:
    """A phase that needs more than there is."""

    stage: str
    phase: str
    where: str  # device or host
    needed: float
    there: float
    largest: str  # role and kind of the largest part


@dataclass(frozen=True)
class RunPlan:
    machine: Machine
    nodes: int
    device_memory: float  # of one worker
    stages: list[StagePlan]

    def of(self, stage: str) -> StagePlan:
        return next(one for one in self.stages if one.stage == stage)

    @property
    def excesses(self) -> list[Excess]:
        return [excess for stage in self.stages for phase in stage.phases for excess in self._of(stage, phase)]

    @property
    def fits(self) -> bool:
        return not self.excesses

    def _of(self, stage: StagePlan, phase: Phase) -> Iterator[Excess]:
        device, host = phase.device_bytes, stage.host_bytes(phase)
        if not stage.cpu and (device > self.device_memory or (phase.name == "sampling" and stage.rows == 0)):
            yield Excess(stage.stage, phase.name, "device", device, self.device_memory, _largest(phase.device))
        if host > self.machine.host_memory:
            parts = (*phase.host, *(phase.device if stage.cpu else ()))
            yield Excess(stage.stage, phase.name, "host", host, self.machine.host_memory, _largest(parts))


def _largest(parts: Sequence[Part]) -> str:
    """Role and kind, by the sum of their parts."""
    sums: dict[str, float] = {}
    for part in parts:
        name = f"{part.role}: {part.kind}"
        sums[name] = sums.get(name, 0.0) + part.bytes
    return max(sums, key=lambda name: sums[name])


def plan_run(config: RunConfig, shape: ModelShape, machine: Machine, local: bool = False) -> RunPlan:
    """`local`: plain torch in one process."""
    hardware = config.hardware
    on_node = machine.workers(hardware, hardware.workers)
    memory = machine.device_memory(hardware, on_node)
    stages = [_stage(name, config, shape, machine, local) for name in config.pipeline if name in PLANNED]
    return RunPlan(machine, -(-hardware.workers // on_node), memory, stages)


def _stage(name: str, config: RunConfig, shape: ModelShape, machine: Machine, local: bool) -> StagePlan:
    hardware = config.hardware
    workers = config.reward_workers if name == "reward" else hardware.workers
    beside = min(hardware.workers // workers, len(config.reward.models)) if name == "reward" else 1
    on_node = machine.workers(hardware, workers * max(beside, 1))
    layout = layout_of(hardware, workers, local)
    if name != "ppo":
        phases = supervised.phases(name, config, shape, layout, on_node)
        return StagePlan(name, workers, on_node, phases, cpu=layout.cpu)
    ppo = PPOPhases(config, shape, layout, on_node, machine.device_memory(hardware, on_node))
    return StagePlan(name, workers, on_node, ppo.all(), ppo.rows(), layout.cpu)

"""Machines of the data file `configs/machines.yaml`, and this one."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace
from importlib import resources

import yaml

from rlhf.config import HardwareConfig
from rlhf.errors import UserError


@dataclass(frozen=True)
class Machine:
    """A node. Bytes, FLOP/s of a bf16 matrix product, bytes/s; rates are 0 where nobody knows them."""

    name: str
    gpus: int  # 0: workers compute on CPUs, in main memory
    memory: float  # of one GPU
    host_memory: float
    flops: float = 0.0
    memory_bandwidth: float = 0.0
    link_bandwidth: float = 0.0
    host_bandwidth: float = 0.0
    network_bandwidth: float = 0.0

    def with_endless_network(self) -> Machine:
        return replace(self, link_bandwidth=math.inf, network_bandwidth=math.inf)

    def workers(self, hardware: HardwareConfig, of_stage: int) -> int:
        """How many of a stage's workers one node has."""
        if not self.gpus or not hardware.gpus_per_worker:
            return of_stage
        return min(of_stage, max(1, math.floor(self.gpus / hardware.gpus_per_worker)))

    def device_memory(self, hardware: HardwareConfig, workers: int) -> float:
        """What one worker may use, if `workers` share a node."""
        if not hardware.gpus_per_worker:
            return self.host_memory / workers
        return self.memory * min(1.0, hardware.gpus_per_worker)


def machines() -> dict[str, Machine]:
    text = (resources.files("configs") / "machines.yaml").read_text(encoding="utf-8")
    return {
        name: Machine(name, int(given.pop("gpus")), **{key: float(value) for key, value in given.items()})
        for name, given in yaml.safe_load(text).items()
    }


def machine_named(name: str) -> Machine:
    """UserError (2) for a name that the file does not have."""
    known = machines()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"--gpu {name}: configs/machines.yaml has no such machine ({hint})")
    return known[name]

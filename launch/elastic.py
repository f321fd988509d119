"""How many workers a stage gets where the cluster has lost nodes: the most that have room, not under hardware.min_workers.

When there is room again it grows: its workers stop after their step with a checkpoint, and more of them go on from there.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping

from pydantic import ValidationError

from rlhf.config import HardwareConfig, RunConfig
from rlhf.errors import UserError
from stages.base import stage_of

GROW = signal.SIGUSR1.value  # how the ranks of a stage that can grow are asked to stop; nobody sends this signal
LOOKS_S = 10.0  # between two looks for room


def of_each(hardware: HardwareConfig) -> dict[str, float]:
    """What a worker takes of the cluster."""
    return {"CPU": float(hardware.cpus_per_worker), "GPU": float(hardware.gpus_per_worker)}


def processes(config: RunConfig, stage: str) -> int:
    """Workers of the stage, and samplers beside them."""
    return stage_of(stage).workers(config) + (config.ppo.sampling.workers if stage == "ppo" else 0)


def needed(config: RunConfig, stage: str) -> dict[str, float]:
    """What the stage takes of the cluster."""
    return {kind: processes(config, stage) * amount for kind, amount in of_each(config.hardware).items()}


def fits(config: RunConfig, stage: str, have: Mapping[str, float]) -> bool:
    return all(amount <= have[kind] for kind, amount in needed(config, stage).items())


def sized(config: RunConfig, stage: str, have: Mapping[str, float]) -> RunConfig:
    """The settings with as many workers as have room and divide the batches. Unchanged where all have room, or where not
    even hardware.min_workers have."""
    least = config.hardware.min_workers or config.hardware.workers
    for workers in range(config.hardware.workers, least - 1, -1):
        smaller = with_workers(config, workers)
        if smaller is not None and fits(smaller, stage, have):
            return smaller
    return config


def with_workers(config: RunConfig, workers: int) -> RunConfig | None:
    """The settings for another number of workers; None if it does not divide the batches, which stay as they are."""
    if workers == config.hardware.workers:
        return config
    settings = config.model_dump(mode="json")
    hardware = settings["hardware"] | {"workers": workers}
    if hardware["workers_per_reward_model"]:
        hardware["workers_per_reward_model"] = min(hardware["workers_per_reward_model"], workers)
    try:
        smaller = RunConfig.model_validate(settings | {"hardware": hardware | {"min_workers": None}})
    except ValidationError:
        return None
    return smaller.with_fitting_micro_batches()


def can_grow(
    config: RunConfig, smaller: RunConfig, stage: str, have: Mapping[str, float], free: Mapping[str, float]
) -> bool:
    """Whether more workers have room than those of `smaller`, which run. `have` and `free`: all that the cluster has, and
    what nobody uses. Both lag behind, so the lower one counts."""
    own = needed(smaller, stage)
    room = {kind: min(have[kind], free[kind] + amount) for kind, amount in own.items()}
    return sized(config, stage, room).hardware.workers > smaller.hardware.workers and fits(smaller, stage, room)


def stopped_to_grow(failure: UserError | None) -> bool:
    return failure is not None and failure.exit_code == 128 + GROW

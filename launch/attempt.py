"""One attempt of a stage on Ray: a Ray Train job without retries of its own, because the driver decides about those."""

from __future__ import annotations

import faulthandler
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.base_model import fetch_on_nodes
from launch.elastic import of_each
from launch.environment import carried
from launch.supervision import Ended
from launch.worker import ATTEMPT_MARK, note_failure, run_rank
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim, life
from rlhf.runs.guard import guarded


@dataclass(frozen=True)
class Attempt:
    stage: str
    name: str  # of its folder of signs of life
    workers: int
    note: str  # a line to show under the stage's bar


def start(config: RunConfig, attempt: Attempt) -> Any:
    """Starts an attempt. `outcome` says how what is returned has ended."""
    import ray

    # Ray Train is driven from a task, not from here: its imports take seconds, and several groups run side by side.
    # The task is on this node, or the loss of another one would end it without a word about who died.
    here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
    run = ray.remote(_fit).options(num_cpus=0, max_retries=0, label_selector=here)
    follower = claim.followed(config.folder)
    payload = {
        "settings": config.model_dump(mode="json"),
        "claim": follower and follower.key,
        "secrets": carried(secret=True),
        "attempt": asdict(attempt),
    }
    return run.remote(payload)


def outcome(reference: Any) -> Ended | None:
    """How an attempt failed; None if it did not."""
    import ray

    try:
        return ray.get(reference)
    except Exception as error:  # noqa: BLE001  whatever befell the task: its node may be gone
        return Ended(str(error))


def free_places() -> None:
    """Gives back what the workers of a killed attempt held. Ray keeps it as long as the driver lives, and its own cleaner
    needs a dashboard."""
    import ray
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    table: Any = gcs_pb2
    kind = table.PlacementGroupTableData
    own = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for data in state._connect_and_get_accessor().get_placement_group_table():
        place = kind.FromString(data)
        if place.creator_job_id == own and place.creator_actor_dead and place.state != kind.REMOVED:
            remove_placement_group(PlacementGroup(PlacementGroupID(place.placement_group_id)))


def memory_kills() -> int:
    """How many processes the system of this host has ended for want of memory; 0 where it does not say."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _fit(payload: dict[str, Any]) -> Ended | None:
    """One attempt: runs the workers; how they failed, None if they did not."""
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError

    config, attempt = _unpack(payload)
    claim.require()
    folder = config.folder / attempt.stage
    try:
        fetch_on_nodes(config, attempt.stage, payload["secrets"])
    except UserError as error:
        note_failure(config, attempt.stage, error)
        return Ended(error.message)
    life.fetched(folder / life.FOLDER / attempt.name)
    try:
        _trainer(config, attempt, payload).fit()
        return None
    except WorkerGroupError as error:
        failures = error.worker_failures.items()
        died = {rank: str(one) for rank, one in failures if isinstance(one, WorkerHealthCheckFailedError)}
        return Ended(str(error), died)
    except ControllerError as error:
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return Ended(str(error))
        return Ended(_no_room(config, attempt.workers), no_room=True)


def _no_room(config: RunConfig, workers: int) -> str:
    hardware = config.hardware
    each = f"{hardware.cpus_per_worker:g} CPUs and {hardware.gpus_per_worker:g} GPUs"
    return (
        f"the cluster had no room for {workers} workers with {each} each within {hardware.placement_timeout_s:g} s "
        "(hardware.placement_timeout_s). Lower hardware.workers, add nodes, or wait until others need less."
    )


def _unpack(payload: dict[str, Any]) -> tuple[RunConfig, Attempt]:
    """What a process of Ray works on, which from now on follows the driver's claim."""
    os.environ.update(payload["secrets"])
    config = RunConfig.model_validate(payload["settings"])
    if payload["claim"] is not None:
        claim.follow(config.folder, payload["claim"])
    return config, Attempt(**payload["attempt"])


def _trainer(config: RunConfig, attempt: Attempt, payload: dict[str, Any]) -> Any:
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as TrainRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from launch.loopback import LoopbackConfig

    hardware = config.hardware
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(hardware.placement_timeout_s)
    group = LoopbackConfig if hardware.ray_address is None else TorchConfig
    return TorchTrainer(
        _worker,
        train_loop_config=payload,
        scaling_config=ScalingConfig(
            num_workers=attempt.workers,
            use_gpu=hardware.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in of_each(hardware).items() if amount},
        ),
        torch_config=group(timeout_s=int(hardware.collective_timeout_s)),
        run_config=TrainRunConfig(
            name=f"{attempt.stage.replace('/', '-')}-{attempt.name}",
            storage_path=str(config.folder / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )


def _worker(payload: dict[str, Any]) -> None:
    """Runs `launch.worker` on every worker, with its output in the stage's log."""
    import torch.distributed as dist

    config, attempt = _unpack(payload)
    folder, rank = config.folder / attempt.stage, dist.get_rank()
    log = folder / "logs" / f"rank-{rank}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("a", buffering=1)  # never closed: Ray writes to it after the stage has ended
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = stream, stream
    stream.write(f"{ATTEMPT_MARK}\n")  # Ray prints what `print` gets twice
    faulthandler.enable(stream)
    alive = life.show(folder / life.FOLDER / attempt.name, rank)
    if payload["claim"] is not None:
        claim.follow(config.folder, payload["claim"], alive)
    with guarded(claim.followed(config.folder)):  # the imports of a stage take longer than a rank may be silent
        run_rank(config, attempt.stage, local=False, note=attempt.note, open_pool=_pool(config, attempt))


def _pool(config: RunConfig, attempt: Attempt) -> Any:
    """What opens the samplers beside the workers, if the stage has any."""
    count = config.ppo.sampling.workers if attempt.stage == "ppo" else 0
    if not count:
        return None
    from launch.sampler_pool import open_pool

    return open_pool(f"samplers of {config.folder} {attempt.name}", config.hardware, count)

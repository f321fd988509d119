"""A stage as a group of workers on Ray, and how the program connects to Ray."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from launch import signals
from launch.elastic import fits, needed, of_each, sized
from launch.environment import carried
from launch.worker import FAILURE, UNEXPECTED, note_failure, read_failure
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim
from stages.base import parts_of, stage_of

QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

KINDS = ("CPU", "GPU")
STARTS = 3
TOO_SLOW = re.compile("timed out during startup|while waiting for node to startup", re.IGNORECASE)
# A socket's path has at most 107 bytes, 103 on a Mac, of which /session_<time>_<pid>/sockets/plasma_store takes 64.
LONGEST_FOLDER = 103 - 64


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """A connection with a cluster that has room for the run, and whose nodes agree."""
    with connection(config.hardware.ray_address, config.folder / "ray"):
        _wait_for_room(config)
        if config.hardware.ray_address is not None:
            _compare_nodes(config)
        yield


@contextmanager
def connection(address: str | None, folder: Path) -> Iterator[None]:
    """The cluster at `address`, or a private Ray on this machine; disconnected at the end. `folder` gets what Ray says."""
    own = QUIET | (_on_loopback() if address is None else {})
    os.environ.update({key: os.environ.get(key, value) for key, value in own.items()})
    if address is None:
        _private_token(folder)
    import ray

    arguments = ray_arguments(address)
    _keep_messages(folder / "messages.log")
    with short_folder() if address is None else nullcontext() as temporary:
        if temporary is not None:
            arguments["_temp_dir"] = temporary
        try:
            with _own_session():
                start(lambda: ray.init(**arguments), ray.shutdown)
            signals.install()  # Ray has set handlers that abort the process
            yield
        finally:
            ray.shutdown()


def _on_loopback() -> dict[str, str]:
    """Lets a private Ray and its workers listen on the loopback interface only. Ray reads it when it is imported."""
    import psutil

    addresses = {name: [each.address for each in own] for name, own in psutil.net_if_addrs().items()}
    interface = next((name for name, own in addresses.items() if "127.0.0.1" in own), "lo")
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address is 127.0.0.1
        "RAY_enable_metrics_collection": "0",  # its exporter listens on all interfaces
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }


def ray_arguments(address: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address is None:
        return arguments | {"num_cpus": os.cpu_count(), "include_dashboard": False, "address": "local"}
    if variables := carried(secret=False):
        arguments["runtime_env"] = {"env_vars": variables}
    return arguments | {"address": address}


@contextmanager
def _own_session() -> Iterator[None]:
    """Lets Ray start its processes in a session of their own: a signal to the process group, such as Ctrl-C in a terminal,
    is for the driver, which lets the workers finish their step."""
    from ray._private import services

    usual = services.ConsolePopen
    services.ConsolePopen = partial(usual, start_new_session=True)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        services.ConsolePopen = usual


def start(init: Callable[[], Any], shutdown: Callable[[], None]) -> None:
    """Ray gives a node 30 s to start, which is too short on a busy machine, so it is started several times.

    UserError (5) where no start is quick enough.
    """
    for _ in range(STARTS):
        try:
            init()
            return
        except Exception as error:
            if not TOO_SLOW.search(str(error)):
                raise
            shutdown()
    raise UserError(
        f"Ray did not start within its time limit, {STARTS} times over: this machine is too busy. Wait until other "
        "programs on it have ended and run again, or use --local with `rlhf stage`, which needs no Ray.",
        5,
    )


@contextmanager
def short_folder() -> Iterator[str | None]:
    """A short folder for Ray's sockets if their paths would be too long in the usual place; else None."""
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(os.fsencode(usual / "ray")) <= LONGEST_FOLDER:
        yield None
        return
    try:
        folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    except OSError as error:
        raise UserError(
            f"the path of {usual} is too long for the sockets of Ray, and /tmp cannot be used ({error.strerror}): set "
            f"RAY_TMPDIR to a folder with a path of at most {LONGEST_FOLDER - 4} bytes",
            5,
        ) from None
    text = (
        f"the path of {usual} is too long for the sockets of Ray, which go to {folder}; RAY_TMPDIR names another place"
    )
    print(f"warning: {text}", file=sys.stderr)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class WorkerGroup:
    """A running stage. `done()` says whether it has ended; `result()` raises what the stage raised."""

    def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
        import ray

        self.stage = stage
        # Ray Train is driven from a task, not from here: its imports take seconds, and several groups run side by side.
        run = ray.remote(_fit).options(num_cpus=0, max_retries=0)
        follower = claim.followed(config.folder)
        payload = {
            "settings": config.model_dump(mode="json"),
            "stage": stage,
            "claim": follower and follower.key,
            "secrets": carried(secret=True),
        }
        self._reference = run.remote(payload, workers)

    def done(self, timeout_s: float) -> bool:
        import ray

        return bool(ray.wait([self._reference], timeout=timeout_s)[0])

    def result(self) -> None:
        import ray

        ray.get(self._reference)


def _fit(payload: dict[str, Any], workers: int) -> None:
    """Runs the workers, and restarts them from the last checkpoint if one died for any reason but a user's mistake."""
    config, stage = _unpack(payload)
    folder = config.folder / stage
    for attempt in range(config.hardware.max_restarts + 1):
        claim.require()
        (folder / FAILURE).unlink(missing_ok=True)
        try:
            _fetch_base_model(config, payload)
            _trainer(*_with_room(config, payload, workers), attempt).fit()
            return
        except Exception:
            failure = read_failure(folder)
            mistake = failure is not None and failure.exit_code != UNEXPECTED
            if mistake or attempt == config.hardware.max_restarts:
                raise


def _fetch_base_model(config: RunConfig, payload: dict[str, Any]) -> None:
    from launch.base_model import fetch_on_nodes

    try:
        fetch_on_nodes(config, payload["stage"], payload["secrets"])
    except UserError as error:
        note_failure(config.folder / payload["stage"], error)
        raise


def _with_room(config: RunConfig, payload: dict[str, Any], workers: int) -> tuple[RunConfig, dict[str, Any], int]:
    """Settings, payload and workers as they are, or smaller ones where a node stays away for `placement_timeout_s`."""
    stage, hardware = payload["stage"], config.hardware
    if hardware.min_workers is None:
        return config, payload, workers
    smaller = sized(config, stage, _room_within(hardware.placement_timeout_s, config, stage))
    if smaller is config:
        return config, payload, workers
    left = stage_of(stage).workers(smaller)
    note = f"goes on with {left} of {workers} workers: the cluster has no room for more"
    return smaller, payload | {"settings": smaller.model_dump(mode="json"), "note": note}, left


def _unpack(payload: dict[str, Any]) -> tuple[RunConfig, str]:
    """Settings and stage of a process of Ray, which from now on follows the driver's claim."""
    os.environ.update(payload["secrets"])
    config = RunConfig.model_validate(payload["settings"])
    if payload["claim"] is not None:
        claim.follow(config.folder, payload["claim"])
    return config, payload["stage"]


def _trainer(config: RunConfig, payload: dict[str, Any], workers: int, attempt: int) -> Any:
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
            num_workers=workers,
            use_gpu=hardware.gpus_per_worker > 0,
            resources_per_worker={name: amount for name, amount in of_each(hardware).items() if amount},
        ),
        torch_config=group(timeout_s=int(hardware.collective_timeout_s)),
        run_config=TrainRunConfig(
            name=f"{payload['stage'].replace('/', '-')}-{time.time_ns()}-{attempt}",
            storage_path=str(config.folder / "ray"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )


def _worker(payload: dict[str, Any]) -> None:
    """Runs `launch.worker` on every worker, with its output in the stage's log."""
    import torch.distributed as dist

    from launch.worker import run_rank

    config, stage = _unpack(payload)
    log = config.folder / stage / "logs" / f"rank-{dist.get_rank()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("a", buffering=1)  # never closed: Ray writes to it after the stage has ended
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = stream, stream
    run_rank(config, stage, local=False, note=payload.get("note", ""))


def _keep_messages(path: Path) -> None:
    """Ray prints a page for every worker that dies, which goes to a log; the driver prints one line."""
    from ray._private import worker

    def keep(data: dict[str, Any], ignore_prefix: bool) -> None:
        with path.open("a") as log:
            log.writelines(f"{line}\n" for line in data["lines"])

    path.parent.mkdir(parents=True, exist_ok=True)
    worker.print_to_stdstream = keep


def _private_token(folder: Path) -> None:
    """A token for this run only: Ray would write one to the home folder, and later clusters would require it."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    path = folder.absolute() / "token"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


def has_room(config: RunConfig, stage: str, running: Iterable[tuple[RunConfig, str]]) -> bool:
    """Whether the stage fits beside those that run. UserError(5) if it does not fit alone."""
    have = cluster_resources()
    _check_room(config, stage, have)
    used = Counter[str]()
    for other in [*running, (config, stage)]:
        used.update(needed(sized(*other, have), other[1]))
    return all(used[kind] <= have[kind] for kind in KINDS)


def _compare_nodes(config: RunConfig) -> None:
    """The quick half of `rlhf doctor`. UserError where a run could not work."""
    from launch.doctor.examine import examine_nodes
    from launch.doctor.result import in_a_line, raise_failed
    from launch.terminal import console

    results = list(examine_nodes(config, thorough=False))
    for one in results:
        if one.verdict == "warning":
            console.print(f"warning: {in_a_line(one)}", style="yellow", markup=False, highlight=False)
    raise_failed(results)


def _wait_for_room(config: RunConfig) -> None:
    """UserError(5) if the largest worker group cannot be placed. Waits for a cluster that is still starting."""
    hardware = config.hardware
    largest = max(parts_of(config), key=lambda part: stage_of(part).workers(config))
    seconds = hardware.placement_timeout_s if hardware.ray_address else 0
    _check_room(config, largest, _room_within(seconds, config, largest))


def _room_within(seconds: float, config: RunConfig, stage: str) -> dict[str, float]:
    """What the cluster has as soon as the stage fits; after `seconds`, what it has then."""
    deadline = time.monotonic() + seconds
    while not fits(config, stage, have := cluster_resources()) and time.monotonic() < deadline:
        claim.require()
        time.sleep(1)
    return have


def _check_room(config: RunConfig, stage: str, have: Mapping[str, float]) -> None:
    config = sized(config, stage, have)
    workers = stage_of(stage).workers(config)
    for kind, all_need in needed(config, stage).items():
        if all_need > have[kind]:
            raise UserError(
                f"{workers} workers × {all_need / workers:g} {kind}s = {all_need:g}, but the cluster has {have[kind]:g}. "
                f"Lower hardware.workers or hardware.{kind.lower()}s_per_worker, or add nodes.",
                5,
            )


def cluster_resources() -> dict[str, float]:
    import ray

    found = ray.cluster_resources()
    return {kind: found.get(kind, 0.0) for kind in KINDS}

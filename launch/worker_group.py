"""A stage as a group of workers on Ray, and how the program connects to Ray."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from launch import attempt, signals
from launch.elastic import fits, needed, sized
from launch.environment import carried
from launch.existing_cluster import require_answer
from launch.supervision import Budget, Watch, cause, newest_checkpoint, since
from launch.worker import FAILURE, memory_remedy, read_failure
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.runs import claim, life
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
ENDS_S = 20.0  # for Ray to see that a process is gone
FREED_S = 3.0  # between two looks for room that a killed attempt still holds
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
    if address is not None:
        require_answer(address)
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
    """A running stage. `done()` says whether it has ended; `result()` raises what the stage raised.

    Where a worker dies or is silent, the group is started again from the newest checkpoint.
    """

    def __init__(self, config: RunConfig, stage: str, workers: int) -> None:
        self._config, self._stage, self._workers = config, stage, workers
        self._folder = config.folder / stage
        self._budget = Budget(config.hardware.max_restarts)
        self._error: UserError | None = None
        self._attempts, self.restarts = 0, 0
        self.news: list[str] = []  # lines for people that nobody has seen yet
        self._reference: Any = None  # of the attempt; None while it waits for something to begin
        self._due, self._obstacle = time.monotonic(), ""
        self._begin()

    def done(self, timeout_s: float) -> bool:
        import ray

        if self._reference is None:
            time.sleep(timeout_s)
            self._begin()
            return self._error is not None
        if ray.wait([self._reference], timeout=timeout_s)[0]:
            return self._has_ended()
        now = time.monotonic()
        self._watch.look(now, claim.storage_fault())
        if self.restarts and self._watch.missing() and now - self._freed > FREED_S:
            self._freed = now
            attempt.free_places()
        if self._given_up:
            self._end_for_good(now)
        elif late := self._late(now):
            self._give_up(late, now)
        return False

    def result(self) -> None:
        if self._error is not None:
            raise self._error

    def waits_for(self) -> str:
        """Whom the group waits for and since when, "" if it works."""
        now = time.monotonic()
        if self._reference is None:
            return f"{self._obstacle}, {since(now - self._due, self._limit_s)}"
        if fault := claim.storage_fault():
            return f"the storage of {self._config.runs_dir} ({fault})"
        return self._watch.waits_for(now, 2 * self._limit_s)

    @property
    def _limit_s(self) -> float:
        """For room in the cluster, and as long again to start there."""
        return self._config.hardware.placement_timeout_s

    def _begin(self) -> None:
        """Begins the next attempt as soon as it can."""
        try:
            config = self._with_room()
            if config is not None:
                self._begin_with(config)
        except OSError as error:
            self._obstacle = f"the storage of {self._folder} ({error.strerror or error})"
            if time.monotonic() - self._due > self._limit_s:
                text = f"{self._folder} could not be written for {self._limit_s:.0f} s: {error.strerror or error}"
                self._error = UserError(text, 5)

    def _with_room(self) -> RunConfig | None:
        """The settings, with fewer workers where a node stays away for `placement_timeout_s`; None while it may be back."""
        if self._config.hardware.min_workers is None or fits(self._config, self._stage, have := cluster_resources()):
            return self._config
        if time.monotonic() - self._due < self._limit_s:
            self._obstacle = f"room for all of its {self._workers} workers"
            return None
        return sized(self._config, self._stage, have)

    def _begin_with(self, config: RunConfig) -> None:
        self._attempts += 1
        self._place = life.begin(self._folder, f"attempt-{self._attempts}-{time.time_ns()}")
        (self._folder / FAILURE).unlink(missing_ok=True)
        workers = self._workers if config is self._config else stage_of(self._stage).workers(config)
        note = f"goes on with {workers} of {self._workers} workers: the cluster has no room for more"
        self._watch = Watch(self._place, workers, time.monotonic())
        self._given_up: tuple[list[int], float] | None = None
        self._freed = time.monotonic()
        self._killed_for_memory = attempt.memory_kills()
        own = attempt.Attempt(self._stage, self._place.name, workers, note if workers < self._workers else "")
        self._reference = attempt.start(config, own)

    def _has_ended(self) -> bool:
        ended = attempt.outcome(self._reference)
        if ended is None:
            return True
        ranks = self._given_up[0] if self._given_up else []
        if attempt.memory_kills() > self._killed_for_memory:
            ended = replace(ended, text=f"out of memory\n{ended.text}")
        if not ended.died and read_failure(self._folder) is None:  # Ray says less of a death while the group opens
            ended = replace(ended, died=dict.fromkeys(self._watch.gone, ""))
        found = cause(self._folder, self._place, ended, ranks, memory_remedy(self._config, self._stage))
        checkpoint = newest_checkpoint(self._folder)
        if not found.can_restart or signals.pending() or not self._budget.allows(checkpoint):
            self._error = found.error
            return True
        self.restarts += 1
        start = f"goes on after step {checkpoint}" if checkpoint >= 0 else "starts over, for it has no checkpoint yet"
        left = self._config.hardware.max_restarts - self._budget.used
        self.news.append(f"{found.error.message}; {start} (restarts left until the next checkpoint: {left})")
        self._reference, self._due = None, time.monotonic()
        self._begin()
        return self._error is not None

    def _late(self, now: float) -> list[int]:
        """Ranks that are silent, or did not start in time."""
        return [*self._watch.silent(now), *self._watch.overdue(now, 2 * self._limit_s)]

    def _give_up(self, late: list[int], now: float) -> None:
        """Ends silent ranks here, so that Ray sees their death; elsewhere Ray ends the whole group in `_end_for_good`."""
        self._given_up = (late, now)
        for rank, one in life.read(self._place).items():
            if rank in late and one.is_here and not one.is_gone:
                os.kill(one.pid, signal.SIGKILL)

    def _end_for_good(self, now: float) -> None:
        import ray

        if self._given_up and now - self._given_up[1] > ENDS_S:
            ray.cancel(self._reference, force=True)


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
    begun, limit_s = time.monotonic(), hardware.placement_timeout_s if hardware.ray_address else 0.0
    was_said = False
    while not fits(config, largest, have := cluster_resources()) and time.monotonic() - begun < limit_s:
        claim.require()
        if not was_said:
            needs, limit = _lack(config, largest, have), f"{since(0, limit_s)} (hardware.placement_timeout_s)"
            print(f"waits for nodes: {needs}, {limit}", file=sys.stderr, flush=True)
            was_said = True
        time.sleep(1)
    _check_room(config, largest, have)


def _check_room(config: RunConfig, stage: str, have: Mapping[str, float]) -> None:
    if lack := _lack(sized(config, stage, have), stage, have):
        kind = "gpus" if "GPU" in lack else "cpus"
        raise UserError(f"{lack}. Lower hardware.workers or hardware.{kind}_per_worker, or add nodes.", 5)


def _lack(config: RunConfig, stage: str, have: Mapping[str, float]) -> str:
    """What the stage needs more than the cluster has, "" if it fits."""
    workers = stage_of(stage).workers(config)
    for kind, all_need in needed(config, stage).items():
        if all_need > have[kind]:
            return (
                f"{workers} workers × {all_need / workers:g} {kind}s = {all_need:g}, but the cluster has {have[kind]:g}"
            )
    return ""


def cluster_resources() -> dict[str, float]:
    import ray

    found = ray.cluster_resources()
    return {kind: found.get(kind, 0.0) for kind in KINDS}

"""How the program connects to Ray: to a cluster that is there, or to a private Ray on this machine."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from launch import signals
from launch.environment import carried
from launch.existing_cluster import require_answer
from rlhf.errors import UserError

QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

ALONE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}  # nobody announces that this machine goes; the actor costs seconds
STARTS = 3
TOO_SLOW = re.compile("timed out during startup|while waiting for node to startup", re.IGNORECASE)
# A socket's path has at most 107 bytes, 103 on a Mac, of which /session_<time>_<pid>/sockets/plasma_store takes 64.
LONGEST_FOLDER = 103 - 64


@contextmanager
def connection(address: str | None, folder: Path) -> Iterator[None]:
    """The cluster at `address`, or a private Ray on this machine; disconnected at the end. `folder` gets what Ray says."""
    own = QUIET | (ALONE | _on_loopback() if address is None else {})
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

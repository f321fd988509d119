"""A cluster that was there before the run: whether it answers. The wait has a limit."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

from rlhf.errors import UserError

ANSWER_S = 90.0
PORT = re.compile(r"^(?:ray://)?(?P<host>[^/]+):(?P<port>\d+)$")
# In a process of its own, because a connection that is never answered cannot be given up in this one.
PROBE = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False); print('here')"


def require_answer(address: str) -> None:
    """UserError (5) unless a Ray cluster at `address` takes this program."""
    deadline = time.monotonic() + ANSWER_S
    if match := PORT.match(address):
        _wait_for_port(address, match["host"].strip("[]"), int(match["port"]), deadline)
    try:
        probe = subprocess.run(
            [sys.executable, "-c", PROBE, address],
            capture_output=True,
            text=True,
            timeout=max(1.0, deadline - time.monotonic()),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _no_answer(address, f"it has not answered for {ANSWER_S:.0f} s") from None
    if probe.returncode:
        said = [line for line in probe.stderr.strip().splitlines() if line.strip()]
        raise _no_answer(address, said[-1][:300] if said else f"exit code {probe.returncode}")


def _wait_for_port(address: str, host: str, port: int, deadline: float) -> None:
    """A head that is just starting opens its port late."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _no_answer(address, str(error.strerror or error)) from None
        time.sleep(1)


def _no_answer(address: str, reason: str) -> UserError:
    return UserError(
        f"no Ray cluster takes this run at {address} (hardware.ray_address): {reason}. Is its head running, and reachable "
        "from here? `auto` also finds a private Ray of another user, which asks for a token: then give the address of "
        "the cluster, or leave hardware.ray_address out.",
        5,
    )

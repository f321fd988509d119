"""Processes with namespaces of their own: the switch, and the nodes inside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rlhf.errors import UserError

TOOLS = {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "ip": "iproute2"}
LIMIT_S = 30.0

# A process that waits, and whose orphans vanish when they end: an ignored SIGCHLD stays ignored in `sleep`.
WAIT = "trap '' CHLD; exec sleep infinity"
SWITCH = f"ip link set lo up; ip link add br0 type bridge; ip link set br0 up; : >$0; {WAIT}"
# $0 is made when all is ready, $1 name, $2 hosts file; the other paths stay visible where they lie under /tmp.
NODE = f"""
ready=$0; hostname $1; mount --bind $2 /etc/hosts; shift 2
mount -t tmpfs -o size=4g,mode=1777 tmpfs /dev/shm
mount --bind /tmp /mnt; mount -t tmpfs -o mode=1777 tmpfs /tmp
for path in "$@"; do case $path in /tmp/*) mkdir -p "$path"; mount --bind "/mnt${{path#/tmp}}" "$path";; esac; done
umount /mnt; ip link set lo up; : >$ready; {WAIT}
"""


def check_machine() -> None:
    """UserError (5) where pseudo-nodes cannot be made."""
    if sys.platform != "linux":
        raise UserError("the testbed needs the namespaces of Linux; run it there, for instance in a virtual machine", 5)
    if os.geteuid() != 0:
        raise UserError("the testbed makes network namespaces, which only root may do: run it as root or by sudo", 5)
    if missing := [f"{tool} (package {package})" for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        raise UserError(f"the testbed needs {', '.join(missing)}: install it and run again", 5)
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False, capture_output=True, text=True
    )
    if tried.returncode:
        raise UserError(
            f"the testbed makes namespaces, which this machine refuses ({tried.stderr.strip()}): a container needs "
            "--privileged",
            5,
        )


def start_switch(log: Path) -> int:
    """PID of a process with a network of its own, in which a bridge joins the cables of the nodes."""
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return _start([*command, "sh", "-ec", SWITCH], [], log)


def start_node(switch: int, name: str, hosts: Path, visible: Sequence[Path], log: Path) -> int:
    """PID of the first process of a node."""
    command = [*inside(switch), "unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
    return _start([*command, "--mount-proc", "sh", "-ec", NODE], [name, str(hosts), *map(str, visible)], log)


def inside(pid: int, folder: Path | None = None) -> list[str]:
    """The words before a command that runs in all namespaces of a process, in `folder`."""
    enter = ["nsenter", "--target", str(pid), "--mount", "--uts", "--ipc", "--net", "--pid"]
    return enter if folder is None else [*enter, "env", f"--chdir={folder}"]


def processes_inside(pid: int) -> list[psutil.Process]:
    """Those in the PID namespace of a process, from the oldest to the newest."""
    space, found = os.readlink(f"/proc/{pid}/ns/pid"), []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                found.append(process)
    return sorted(found, key=lambda process: process.create_time())


def network(switch: int, *words: str) -> None:
    """A command on the cables, for instance `ip link set node1 nomaster`."""
    done = subprocess.run(
        ["nsenter", "--target", str(switch), "--net", *words], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"`{' '.join(words)}` failed on the testbed's switch: {done.stderr.strip()}", 5)


def _start(script: list[str], arguments: list[str], log: Path) -> int:
    """PID of the shell of `script`, when it has come to its end. Its $0 is the file that says so."""
    ready = log.with_suffix(".ready")
    ready.unlink(missing_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*script, str(ready), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + LIMIT_S
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise UserError(f"a part of the testbed did not start: {log.read_text().strip() or log}", 5)
        time.sleep(0.02)
    (*_, last) = psutil.Process(process.pid).children(recursive=True)
    return last.pid

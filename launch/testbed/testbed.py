"""The testbed as an object: nodes that come up, are cut off, made slow and killed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from launch.testbed.namespaces import check_machine, inside, network, processes_inside, start_node, start_switch
from rlhf.errors import UserError
from rlhf.runs.artifacts import write_json

PROJECT = Path(__file__).parents[2]
PORT = 6379
STARTS = 3
RAY = ("--disable-usage-stats", "--object-store-memory=200000000", "--include-log-monitor=false")


class Testbed:
    """The testbed whose state is kept in `folder`. Node 1 is the head; drivers usually run there.

    `with Testbed(folder).up(2) as testbed:` removes it at the end.
    """

    __test__ = False  # for pytest, which takes it for a test

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.shared = self.folder / "shared"
        """The folder that all nodes see; the others of the testbed they see too, but nothing of theirs lies there."""
        self.address = f"{ip_of(1)}:{PORT}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    # --- the whole --------------------------------------------------------------------------------------------------

    def up(self, nodes: int, cpus: int = 1) -> Self:
        """Starts `nodes` nodes with so many CPUs each, and Ray on them. UserError if there is one already."""
        self.up_without_ray(nodes, cpus)
        try:
            self.start_ray(1)
            with ThreadPoolExecutor() as pool:  # each waits for seconds
                list(pool.map(self.start_ray, range(2, nodes + 1)))
        except BaseException:
            self.down()
            raise
        return self

    def up_without_ray(self, nodes: int, cpus: int = 1) -> Self:
        check_machine()
        if self._alive("switch"):
            raise UserError(f"there is a testbed in {self.folder}; remove it first: python -m launch.testbed down")
        shutil.rmtree(self.folder, ignore_errors=True)
        for folder in (self.shared, self.folder / "logs"):
            folder.mkdir(parents=True)
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text(secrets.token_hex(32))
        lines = ["127.0.0.1 localhost", *(f"{ip_of(node)} {name_of(node)}" for node in range(1, nodes + 1))]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        write_json(self.folder / "state.json", {"cpus": cpus})
        try:
            self._note("switch", start_switch(self.folder / "logs/switch.log"))
            for node in range(1, nodes + 1):
                self._make(node)
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Ends everything. Logs and the shared folder stay until the next `up`."""
        self._kill("switch")
        with suppress(FileNotFoundError):
            (self.folder / "state.json").unlink()

    def nodes(self) -> list[int]:
        """Those that are running."""
        numbers = (int(key.removeprefix("node")) for key in self._state() if key.startswith("node"))
        return sorted(number for number in numbers if self._alive(name_of(number)))

    # --- one node ---------------------------------------------------------------------------------------------------

    def start(self, node: int) -> None:
        """Brings a node back that was killed, with Ray."""
        self._make(node)
        self.start_ray(node)

    def _make(self, node: int) -> None:
        """A node with a cable to the switch."""
        if node in self.nodes():
            raise UserError(f"{name_of(node)} is running already")
        name, switch = name_of(node), self._pid("switch")
        visible = (self.folder, PROJECT, Path(sys.prefix), Path(sys.base_prefix))
        pid = start_node(switch, name, self.folder / "hosts", visible, self.folder / "logs" / f"{name}.log")
        self._note(name, pid)
        words = f"ip link add {name} master br0 type veth peer name eth0 netns {pid}"
        network(switch, *words.split())
        network(switch, "ip", "link", "set", name, "up")
        network(pid, "ip", "address", "add", f"{ip_of(node)}/24", "dev", "eth0")
        network(pid, "ip", "link", "set", "eth0", "up")

    def start_ray(self, node: int, environment: dict[str, str] | None = None) -> None:
        role = (
            ("--head", f"--port={PORT}", "--include-dashboard=false") if node == 1 else (f"--address={self.address}",)
        )
        ray = [str(Path(sys.executable).with_name("ray")), "start", *role, f"--node-ip-address={ip_of(node)}"]
        command = [*ray, f"--num-cpus={self._state()['cpus']}", *(RAY if node == 1 else RAY[:2])]
        for _ in range(STARTS):  # Ray gives up after 30 s, which a busy machine may need
            done = self.run(node, command, environment)
            if done.returncode == 0:
                return
            self.run(node, [ray[0], "stop", "--force"])
        raise UserError(f"Ray did not start on {name_of(node)}: {done.stdout.strip().splitlines()[-1]}", 5)

    def run(self, node: int, command: Sequence[str], environment: dict[str, str] | None = None) -> Any:
        """What `command` did on a node: exit code, and all that it wrote."""
        process = self.popen(node, command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        written, _ = process.communicate()
        return subprocess.CompletedProcess(list(command), process.returncode, written)

    def popen(
        self, node: int, command: Sequence[str], environment: dict[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[str]:
        """`command` on a node, under way, as the child of the process that is returned."""
        own = {
            "PYTHONPATH": str(PROJECT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        there = {key: value for key, value in os.environ.items() if key not in ("TMPDIR", "RAY_TMPDIR", "RAY_ADDRESS")}
        words = [*inside(self._pid(name_of(node)), self.shared), *command]
        return subprocess.Popen(words, env=there | own | (environment or {}), text=True, **options)

    # --- faults -----------------------------------------------------------------------------------------------------

    def cut(self, node: int) -> None:
        """Pulls the cable of a node out of the switch: nobody is told, frames get lost."""
        network(self._pid("switch"), "ip", "link", "set", name_of(node), "nomaster")

    def slow(self, node: int, delay_ms: float = 200.0, loss_percent: float = 5.0) -> None:
        """Puts a slow line in place of a node's cable: `delay_ms` there and back, a part of the frames lost."""
        self.heal(node)
        switch, name = self._pid("switch"), name_of(node)
        network(switch, *f"ip link add slow{node} master br0 type veth peer name line{node}".split())
        for end in (f"line{node}", f"slow{node}"):
            network(switch, "ip", "link", "set", end, "up")
        self.cut(node)
        script = [sys.executable, str(Path(__file__).with_name("slow_line.py"))]
        arguments = [name, f"line{node}", str(delay_ms / 2000), str(loss_percent / 100)]
        with (self.folder / "logs" / f"line{node}.log").open("w") as log:
            process = subprocess.Popen(
                [*inside(switch), *script, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
            )
        assert process.stdout
        if not process.stdout.readline():
            raise UserError(f"the slow line did not start: {Path(log.name).read_text().strip()}", 5)

    def heal(self, node: int) -> None:
        """Undoes `cut` and `slow`."""
        switch = self._pid("switch")
        with suppress(UserError):  # there was none
            network(switch, "ip", "link", "delete", f"line{node}")
        network(switch, "ip", "link", "set", name_of(node), "master", "br0")

    def kill(self, node: int) -> None:
        """Ends a node as a power cut does: its peers hear nothing."""
        self.cut(node)
        self._kill(name_of(node))
        with suppress(UserError):  # the kernel takes the cable away with the node, but later
            network(self._pid("switch"), "ip", "link", "delete", name_of(node))

    def processes(self, node: int, words: str) -> list[psutil.Process]:
        """The processes of a node whose command line has `words`, from the oldest to the newest."""
        return [one for one in processes_inside(self._pid(name_of(node))) if words in _command_line(one)]

    # --- PIDs -------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        with suppress(FileNotFoundError):
            return json.loads((self.folder / "state.json").read_text())
        return {}

    def _note(self, name: str, pid: int) -> None:
        """Keeps a PID with the time at which the process began, because the numbers are used again."""
        write_json(self.folder / "state.json", self._state() | {name: [pid, psutil.Process(pid).create_time()]})

    def _alive(self, name: str) -> bool:
        pid, began = self._state().get(name, (0, 0.0))
        with suppress(psutil.Error):
            return pid > 0 and psutil.Process(pid).create_time() == began
        return False

    def _pid(self, name: str) -> int:
        if not self._alive(name):
            raise UserError(f"{name} of the testbed in {self.folder} is not running: python -m launch.testbed up NODES")
        return self._state()[name][0]

    def _kill(self, name: str) -> None:
        """Ends a process and, with it, its PID namespace; waits until all of it is gone."""
        with suppress(UserError, ProcessLookupError):
            pid = self._pid(name)
            os.kill(pid, signal.SIGKILL)
            while self._alive(name):
                time.sleep(0.02)


def name_of(node: int) -> str:
    return f"node{node}"


def ip_of(node: int) -> str:
    return f"10.77.0.{node}"


def _command_line(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""

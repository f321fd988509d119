"""Pseudo-nodes: what each has of its own, what they share, and what can be done to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.testbed import Testbed
from launch.testbed.__main__ import main
from launch.testbed.namespaces import check_machine
from rlhf.errors import UserError


def refusal() -> str:
    """Why there can be no pseudo-nodes here, or ""."""
    try:
        check_machine()
    except UserError as error:
        return error.message
    return ""


needs_namespaces = pytest.mark.skipif(bool(refusal()), reason=refusal())
TIMED = """
import socket, sys, time
connected, answered = [], []
try:
    for _ in range(5):
        began = time.monotonic()
        with socket.create_connection((sys.argv[1], 5000), timeout=3) as end:
            sent = time.monotonic()
            end.sendall(b"x")
            end.recv(1)
            answered.append(time.monotonic() - sent)
            connected.append(sent - began)
    print(min(connected), min(answered))
except OSError:
    print("silence")
"""
ECHO = """
import socket
with socket.create_server(("", 5000)) as server:
    print("ready", flush=True)
    while True:
        end, _ = server.accept()
        with end:
            end.sendall(end.recv(1))
"""


def test_whoever_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["--folder", str(tmp_path), "up", "2"]) == 5
    assert "only root may do: run it as root or by sudo" in capsys.readouterr().err


def test_a_node_of_no_testbed_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="switch of the testbed in .* is not running: python -m launch.testbed up NODES"
    ):
        Testbed(tmp_path).cut(2)


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Two nodes, without Ray."""
    with Testbed(tmp_path_factory.mktemp("testbed")).up_without_ray(2) as testbed:
        yield testbed


def shell(testbed: Testbed, node: int, text: str) -> str:
    done = testbed.run(node, ["sh", "-ec", text])
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


@needs_namespaces
@pytest.mark.integration
def test_nodes_share_a_folder_and_nothing_else(testbed: Testbed) -> None:
    shell(testbed, 1, "echo x | tee file /tmp/own /dev/shm/own && hostname node-one && sleep 99 >/dev/null 2>&1 &")
    assert shell(testbed, 2, "cat file; ls /tmp/own /dev/shm/own 2>/dev/null || hostname") == "x\nnode2"
    assert not {Path("/tmp/own"), Path("/dev/shm/own")} & {*Path("/tmp").iterdir(), *Path("/dev/shm").iterdir()}
    assert len(testbed.processes(1, "sleep 99")) == 1 and not testbed.processes(2, "sleep 99")


@pytest.fixture(scope="module")
def server(testbed: Testbed) -> Iterator[None]:
    process = testbed.popen(1, [sys.executable, "-c", ECHO], stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == "ready\n"
    yield
    process.kill()


def answer(testbed: Testbed) -> str:
    """Seconds until node 2 is connected with node 1 and until it has its answer, the least of five; or "silence"."""
    return testbed.run(2, [sys.executable, "-c", TIMED, "node1"]).stdout.strip()


@needs_namespaces
@pytest.mark.integration
@pytest.mark.usefixtures("server")
def test_a_cable_is_pulled_out_put_back_and_made_slow(testbed: Testbed) -> None:
    assert all(float(seconds) < 0.1 for seconds in answer(testbed).split())
    testbed.cut(2)
    assert answer(testbed) == "silence"
    testbed.heal(2)
    assert all(float(seconds) < 0.1 for seconds in answer(testbed).split())
    testbed.slow(2, delay_ms=400, loss_percent=0)
    assert all(0.4 <= float(seconds) < 0.9 for seconds in answer(testbed).split())
    testbed.slow(2, delay_ms=0, loss_percent=100)
    assert answer(testbed) == "silence"
    testbed.heal(2)
    assert all(float(seconds) < 0.1 for seconds in answer(testbed).split())


@needs_namespaces
@pytest.mark.integration
@pytest.mark.parametrize("how", ["down", "killed"])
def test_nothing_is_left(tmp_path: Path, how: str) -> None:
    links, before = os.listdir("/sys/class/net"), Path("/proc/mounts").read_text()
    with Testbed(tmp_path / "testbed").up_without_ray(2) as testbed:
        testbed.slow(1)
        shell(testbed, 2, "sleep 98 >/dev/null 2>&1 &")
        members = [one for node in (1, 2) for one in testbed.processes(node, "")]
        assert any("98" in one.cmdline() for one in members) and len(members) == 3
        if how == "down":
            testbed.down()
        else:
            os.kill(testbed._pid("switch"), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in members):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert testbed.nodes() == []
    assert os.listdir("/sys/class/net") == links and Path("/proc/mounts").read_text() == before


@needs_namespaces
@pytest.mark.integration
def test_a_second_testbed_in_a_folder_is_refused(testbed: Testbed) -> None:
    with pytest.raises(UserError, match="there is a testbed in .*; remove it first: python -m launch.testbed down"):
        Testbed(testbed.folder).up(2)
    testbed.kill(2)
    assert testbed.nodes() == [1]
    testbed._make(2)
    assert shell(testbed, 2, "hostname") == "node2"

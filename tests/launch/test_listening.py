"""What listens on the network while a stage runs on one machine, as the system tells it, and that docs/security.md says so."""

from __future__ import annotations

import ipaddress
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--sft.epochs", "1", "--sft.checkpoints", "0", "--tracking.uri", "null", "--pipeline", "[sft]"]
KINDS = {  # by what stands in the command line, in this order
    "gcs_server": "Ray's directory (`gcs_server`)",
    "raylet/raylet": "Ray's scheduler (`raylet`)",
    "DashboardAgent": "Ray's agent for the node",
    "RuntimeEnvAgent": "Ray's agent for environments",
    "RayTrainWorker": "workers: Ray, the store and the connections of the process group",
    "ray::": "Ray's other processes",
    "/ray/dashboard/": "Ray's other processes",  # until they have given themselves a name
    "/ray/autoscaler/": "Ray's other processes",
    "launch.cli": "`rlhf`, the driver",
}


class Listener(NamedTuple):
    kind: str
    address: str


def listeners(process: psutil.Process) -> set[Listener]:
    found = set()
    for each in [process, *process.children(recursive=True)]:
        try:
            command = " ".join(each.cmdline())
            sockets = [one for one in each.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        except psutil.Error:  # it has ended
            continue
        kind = next((name for part, name in KINDS.items() if part in command), command)
        found |= {Listener(kind, one.laddr.ip) for one in sockets}
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[Listener], Path]:
    """All that listened while two workers trained, looked at again and again, and the run's folder."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "launch.cli", "run", "tests/smoke.yaml", "--runs_dir", str(folder), *SMALL]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "GLOO", "NCCL"))}
    found: set[Listener] = set()
    log = (folder / "log").open("w")
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log) as process:
        while process.poll() is None:
            found |= listeners(psutil.Process(process.pid))
            time.sleep(2)
    assert process.returncode == 0, (folder / "log").read_text()
    return found, folder / "smoke"


@pytest.mark.integration
def test_on_one_machine_all_listen_on_the_loopback_interface(seen: tuple[set[Listener], Path]) -> None:
    found, _ = seen
    kinds = {each.kind for each in found}
    assert {KINDS["gcs_server"], KINDS["raylet/raylet"], KINDS["RayTrainWorker"]} <= kinds <= {*KINDS.values()}
    addresses = {each: ipaddress.ip_address(each.address) for each in found}
    reachable = [each for each, ip in addresses.items() if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback]
    assert reachable == []


@pytest.mark.integration
def test_the_page_on_security_names_each_of_them(seen: tuple[set[Listener], Path]) -> None:
    page = (ROOT / "docs/security.md").read_text()
    section = page.partition("## On one machine")[2].partition("\n## ")[0]
    rows = {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")}
    assert {each.kind for each in seen[0]} <= rows - {"process", "---"}


@pytest.mark.integration
def test_a_runs_folder_is_its_users_alone(seen: tuple[set[Listener], Path]) -> None:
    assert stat.S_IMODE(seen[1].stat().st_mode) == 0o700

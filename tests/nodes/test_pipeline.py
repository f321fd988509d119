"""The whole pipeline on two nodes with a worker each: what two workers on one machine make, on shared storage alone."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.testbed import Testbed
from tests.faults.runs import SMOKE, wait_for
from tests.faults.runs import rlhf as rlhf_here
from tests.nodes.runs import largest_difference, metrics, rlhf

NODES = 2
SETTINGS = ["--sft.epochs", "1", "--tracking.uri", "null"]
STAGES = ["sft", "reward/helpfulness", "reward/safety", "ppo"]

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(1200)]


def seen(process: subprocess.Popen[str], testbed: Testbed) -> tuple[int, ...]:
    """Nodes on which a worker of the first stage runs, once it trains."""
    progress = testbed.shared / "runs/smoke/sft/progress.json"
    wait_for(progress.exists, process)
    return tuple(node for node in (1, 2) if testbed.processes(node, "RayTrainWorker"))


@pytest.fixture(scope="module")
def finished(cluster: Testbed, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The smoke run on two nodes, and on this machine."""
    process = rlhf(cluster, "run", *SETTINGS)
    nodes = seen(process, cluster)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    here = tmp_path_factory.mktemp("here")
    alone = rlhf_here(here, "run", str(SMOKE), *SETTINGS)
    shown, _ = alone.communicate(timeout=900)
    assert alone.returncode == 0, shown
    return SimpleNamespace(nodes=nodes, folder=cluster.shared / "runs/smoke", alone=here / "runs/smoke")


def test_every_node_has_a_worker(finished: SimpleNamespace) -> None:
    assert finished.nodes == (1, 2)


@pytest.mark.parametrize("stage", STAGES)
def test_the_weights_are_those_of_two_workers_on_one_machine(finished: SimpleNamespace, stage: str) -> None:
    assert largest_difference(finished.folder / stage, finished.alone / stage) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_so_are_the_metrics(finished: SimpleNamespace, stage: str) -> None:
    assert metrics(finished.folder / stage) == metrics(finished.alone / stage)


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("node", [1, 2])
def test_nothing_is_written_beside_shared_storage(cluster: Testbed, node: int) -> None:
    written = cluster.run(node, ["find", "/tmp", "-xdev", "-type", "f", "-not", "-path", "/tmp/ray/*"])
    own = [path for path in written.stdout.splitlines() if "torchinductor" not in path]
    assert own == [], Path(own[0])

"""The whole pipeline on two nodes with a worker each: what two workers on one machine make, on shared storage alone, and
what listens meanwhile."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.testbed import Testbed
from tests.faults.runs import SMOKE
from tests.faults.runs import rlhf as rlhf_here
from tests.nodes.listening import KINDS, Listening
from tests.nodes.runs import largest_difference, metrics, rlhf

NODES = 2
ROOT = Path(__file__).parents[2]
SETTINGS = ["--sft.epochs", "1", "--tracking.uri", "null"]
STAGES = ["sft", "reward/helpfulness", "reward/safety", "ppo"]
STRANGER = "import ray; ray.init(address='{}', logging_level='ERROR'); print('in:', ray.is_initialized())"

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def finished(cluster: Testbed, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The smoke run on two nodes, and on this machine."""
    watched = Listening(cluster, (1, 2))
    process = rlhf(cluster, "run", *SETTINGS)
    shown, _ = process.communicate(timeout=900)
    assert process.returncode == 0, shown
    listening = watched.found()
    here = tmp_path_factory.mktemp("here")
    alone = rlhf_here(here, "run", str(SMOKE), *SETTINGS)
    shown, _ = alone.communicate(timeout=900)
    assert alone.returncode == 0, shown
    return SimpleNamespace(listening=listening, folder=cluster.shared / "runs/smoke", alone=here / "runs/smoke")


def test_every_node_has_a_worker(finished: SimpleNamespace) -> None:
    for node in (1, 2):
        assert KINDS["RayTrainWorker"] in {name for name, _ in finished.listening[node]}


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


def test_the_page_on_security_says_what_listens_where(finished: SimpleNamespace) -> None:
    section = (ROOT / "docs/security.md").read_text().partition("## On a cluster")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    said = {(name, one) for name, where, *_ in rows for one in where.split(", ") if name in KINDS.values()}
    assert sorted(finished.listening[1] | finished.listening[2]) == sorted(said)


@pytest.mark.parametrize("address", ["node1:6379", "ray://node1:10001"])
def test_whoever_has_no_token_does_not_get_in(cluster: Testbed, address: str) -> None:
    command = [sys.executable, "-c", STRANGER.format(address)]
    inside = cluster.run(2, command)
    assert "in: True" in inside.stdout, inside.stdout
    without = ["env", "--unset=RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE=disabled", "timeout", "60"]
    outside = cluster.run(2, [*without, *command])
    assert outside.returncode != 0 and "in: True" not in outside.stdout

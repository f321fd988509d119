"""What becomes of a stage on two nodes of which one is slow, cut off for good, or lost and back.

`pytest -s -m nodes tests/nodes/test_faults.py` prints the seconds that stand in docs/reliability.md. `make nodes` runs one of
these tests, `make proofs` the others.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from launch.testbed import Testbed
from rlhf.tracking import read_metrics
from tests.faults.runs import newest_checkpoint, steps
from tests.nodes.runs import rlhf

STEPS = 32  # of an epoch
UNTRACKED = ["--tracking.uri", "null"]
LIMIT_S = 600
NOTICED_S = 60
PLACED = ["--hardware.placement_timeout_s", "60"]  # as long to find room, and as long again to start
GONE = r"rank \d on node2 (was lost with its node|gave no sign of life for 45 s: stopped, or cut off)"

RAY = str(Path(sys.executable).with_name("ray"))
COUNT = """
import ray
ray.init(address="{}", logging_level="ERROR")
print("nodes:", sum(node["Alive"] for node in ray.nodes()))
"""

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(1800)]


def length(epochs: int) -> list[str]:
    """Settings for so many epochs, with a checkpoint every eighth step."""
    return ["--sft.packing", "false", "--sft.epochs", str(epochs), "--sft.checkpoints", str(epochs * STEPS // 8 - 1)]


class Watched:
    """SFT under way, and what its files say."""

    def __init__(self, cluster: Testbed, name: str, *settings: str, command: str = "stage sft") -> None:
        self.run = cluster.shared / "runs" / name
        self.folder = self.run / "sft"
        self._process = rlhf(cluster, command, *settings, "--name", name)

    def until(self, condition: Callable[[], Any]) -> float:
        """The seconds until then, while it runs."""
        began = time.monotonic()
        while not condition():
            assert self._process.poll() is None, self._process.communicate()[0]
            assert time.monotonic() - began < LIMIT_S, self.status()
            time.sleep(0.1)
        return time.monotonic() - began

    def done(self) -> int:
        """Lines of steps, also of those that were made again."""
        return len(steps(self.folder)) if (self.folder / "metrics.jsonl").exists() else 0

    def takes(self, number: int) -> float:
        """Seconds for so many further steps."""
        now = self.done()
        return self.until(lambda: self.done() >= now + number)

    def reaches_a_checkpoint(self) -> None:
        newest = newest_checkpoint(self.folder)
        self.until(lambda: newest_checkpoint(self.folder) > newest)

    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())

    def restarts(self) -> int:
        return self.status()["stages"]["sft"]["restarts"]

    def notices(self) -> float:
        """Seconds until the driver gives the group up."""
        before = self.restarts()
        return self.until(lambda: self.restarts() > before)

    def ranks(self) -> int:
        return len([*self.folder.glob("ranks/*/rank-*.json")])

    def ends(self) -> tuple[int, str]:
        """Exit code, and what was printed."""
        shown, _ = self._process.communicate(timeout=LIMIT_S)
        return self._process.returncode, shown


def say(fault: str, **seconds: float) -> None:
    print(f"\n{fault}:", ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))


@pytest.fixture(scope="module")
def pair(machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    with Testbed(tmp_path_factory.mktemp("testbed")).up(2) as testbed:
        yield testbed


@pytest.fixture
def cluster(pair: Testbed) -> Iterator[Testbed]:
    """Two nodes, of which the second gets its line and its Ray back after the test."""
    yield pair
    pair.heal(2)
    pair.run(2, [RAY, "stop"])
    pair.start_ray(2)
    while "nodes: 2" not in (shown := pair.run(1, [sys.executable, "-c", COUNT.format(pair.address)]).stdout):
        assert "nodes: 3" in shown, shown  # a lost one is not given up yet


def assert_whole(folder: Path, epochs: int) -> None:
    """Every step is there once, and none was made from the start again."""
    assert [step for step, _ in read_metrics(folder)["sft/loss"]] == list(range(1, epochs * STEPS + 1))
    assert steps(folder).count(1) == 1
    assert (folder / "artifact/manifest.json").is_file()


@pytest.mark.proof
def test_a_node_that_stays_slow_costs_nothing_but_time(cluster: Testbed) -> None:
    stage = Watched(cluster, "slow", *UNTRACKED, "--sft.epochs", "1")
    stage.until(stage.done)
    cluster.slow(2)
    step = stage.takes(2) / 2
    code, shown = stage.ends()
    say("a slow node", step=step)
    assert code == 0 and stage.restarts() == 0, shown
    assert (stage.folder / "artifact/manifest.json").is_file()


def test_a_node_that_is_cut_off_for_good_ends_the_run(cluster: Testbed) -> None:
    tracked = ["--tracking.uri", f"sqlite:///{cluster.shared}/mlflow.db", "--pipeline", "[sft]"]
    stage = Watched(cluster, "lost", *tracked, *length(epochs=60), *PLACED, command="run")
    stage.reaches_a_checkpoint()
    cluster.cut(2)
    noticed = stage.notices()
    began = time.monotonic()
    code, shown = stage.ends()
    say("a node cut off for good", noticed=noticed, ended=noticed + time.monotonic() - began)
    reason = GONE + ", and then .* (no room for 2 workers|the cluster has 1)"
    ended = stage.status()["ended"]
    assert code == 5 and re.search(reason, shown), shown
    assert ended["status"] == "FAILED" and re.search(reason, ended["reason"])
    assert noticed < NOTICED_S
    client = MlflowClient(tracked[1])
    recorded = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert [run.info.status for run in recorded] == ["FAILED", "FAILED"]  # the run and its stage


@pytest.mark.proof
def test_a_node_lost_for_good_makes_the_stage_smaller_until_it_is_back(cluster: Testbed) -> None:
    epochs = 16
    stage = Watched(cluster, "smaller", *UNTRACKED, *length(epochs), *PLACED, "--hardware.min_workers", "1")
    stage.reaches_a_checkpoint()
    assert stage.ranks() == 2
    cluster.kill(2)
    noticed = stage.notices()
    smaller = noticed + stage.until(lambda: stage.ranks() == 1) + stage.takes(2)
    say("a node lost, min_workers", noticed=noticed, **{"goes on after": smaller})
    cluster.start(2)
    back = stage.notices() + stage.until(lambda: stage.ranks() == 2)
    say("it is back", **{"goes on after": back + stage.takes(2)})
    code, shown = stage.ends()
    assert code == 0 and re.search(GONE, shown), shown
    assert "to go on with more workers: there is room again" in shown, shown
    assert noticed < NOTICED_S and stage.restarts() == 2
    assert_whole(stage.folder, epochs)

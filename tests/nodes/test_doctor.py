"""`rlhf doctor` on three nodes: in good health, and broken in the ways that clusters are."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.testbed import Testbed
from tests.nodes.runs import rlhf

NODES = 3
PROJECT = Path(__file__).parents[2]
SETTINGS = ["--tracking.uri", "null"]
LIMIT_S = 60
SPEED = {"disk", "network"}  # a busy machine is slow

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(600)]

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
}
CLOCK = "import time\nreal = time.time\ntime.time = lambda: real() + 100\n"
REFUSING = """
from http.server import BaseHTTPRequestHandler, HTTPServer
class Refusing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)
    do_POST = do_GET
server = HTTPServer(("", 5000), Refusing)
print("ready", flush=True)
server.serve_forever()
"""


def doctor(cluster: Testbed, *settings: str) -> tuple[int, dict[tuple[str, str, str], str], str]:
    """Exit code; (verdict, check, where) → why, of what is not ok; all that was printed."""
    began = time.monotonic()
    process = rlhf(cluster, "doctor", *(settings or SETTINGS), environment={"COLUMNS": "300"})
    shown, _ = process.communicate(timeout=300)
    assert time.monotonic() - began < LIMIT_S, shown
    rows = re.findall(r"^ *(warning|failed) {2,}(\S.*?) {2,}(.*?) {2,}(\S.*?) *$", shown, re.MULTILINE)
    return process.returncode, {(verdict, check, where): why for verdict, check, where, why in rows}, shown


def shell(cluster: Testbed, node: int, text: str) -> None:
    done = cluster.run(node, ["sh", "-ec", text])
    assert done.returncode == 0, done.stdout


def test_a_healthy_cluster_has_nothing_to_say_against_it(cluster: Testbed) -> None:
    code, problems, shown = doctor(cluster)
    assert code == 0 and {check for _, check, _ in problems} <= SPEED, shown
    assert "3 pairs of nodes" in shown and "is the same on all nodes, also after a rename" in shown
    assert not list(cluster.shared.rglob(".doctor-*"))


@contextmanager
def other_code(cluster: Testbed) -> Iterator[None]:
    file = PROJECT / "stages/sft.py"
    (cluster.folder / "sft.py").write_text(f"{file.read_text()}\n# another revision\n")
    shell(cluster, 2, f"mount --bind {cluster.folder}/sft.py {file}")
    yield
    shell(cluster, 2, f"umount {file}")


@contextmanager
def wrong_clock(cluster: Testbed) -> Iterator[None]:
    """Of the processes that Ray starts on node 3."""
    folder = cluster.folder / "clock"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CLOCK)
    ray = Path(sys.executable).with_name("ray")
    shell(cluster, 3, f"{ray} stop")
    cluster.start_ray(3, {"PYTHONPATH": f"{folder}:{PROJECT}"})
    yield
    shell(cluster, 3, f"{ray} stop")
    cluster.start_ray(3)
    time.sleep(5)


@contextmanager
def storage_of_its_own(cluster: Testbed) -> Iterator[None]:
    shell(cluster, 2, f"mount -t tmpfs tmpfs {cluster.shared}")
    yield
    shell(cluster, 2, f"umount -l {cluster.shared}")


@contextmanager
def full_disk(cluster: Testbed) -> Iterator[None]:
    shell(cluster, 3, f"mount -t tmpfs -o size=1m tmpfs {cluster.shared}")
    yield
    shell(cluster, 3, f"umount -l {cluster.shared}")


@contextmanager
def blocked_pair(cluster: Testbed) -> Iterator[None]:
    shell(cluster, 2, "ip route add blackhole 10.77.0.3/32")
    yield
    shell(cluster, 2, "ip route del blackhole 10.77.0.3/32")


@pytest.mark.parametrize(
    ("broken", "problem", "why"),
    [
        (other_code, ("failed", "code", "node2"), r"files of this project differ .* \(1\): stages/sft.py"),
        (wrong_clock, ("failed", "clock", "node3"), r"(99|100)\.\d s ahead of this machine"),
        (storage_of_its_own, ("failed", "shared storage", "node2"), "does not see in .* what node1, node3 wrote there"),
        (full_disk, ("failed", "storage", "node3"), "runs_dir cannot be used: .*No space left on device"),
        (blocked_pair, ("failed", "network", "node2 and node3"), "they cannot talk: .*(time|refuse|unreachable)"),
    ],
)
def test_what_is_broken_is_found_where_it_is(cluster: Testbed, broken, problem: tuple[str, str, str], why: str) -> None:
    with broken(cluster):
        code, problems, shown = doctor(cluster)
    assert code == 5 and re.search(why, problems[problem]), shown
    others = {where for verdict, _, where in problems if verdict == "failed"} - {problem[2]}
    assert not others or broken is storage_of_its_own, shown  # there the others miss what that node writes


def test_mistakes_of_the_settings_are_found_together(cluster: Testbed) -> None:
    """A model without a tokenizer, and on one node only; wrong credentials; a group that does not fit."""
    shell(cluster, 1, f"mkdir /tmp/model && echo '{json.dumps(LLAMA)}' >/tmp/model/config.json")
    server = cluster.popen(1, [sys.executable, "-c", REFUSING], stdout=-1)
    assert server.stdout and server.stdout.readline() == "ready\n"
    uri = ["--tracking.uri", "http://me:hunter2@node1:5000"]
    code, problems, shown = doctor(cluster, *uri, "--hardware.workers", "4", "--model.path", "/tmp/model")
    server.kill()
    assert code == 4 and "hunter2" not in shown
    assert "4 workers with 1 CPU each are wanted, and there is room for 3" in problems["failed", "room", ""]
    assert (
        problems["failed", "model files", "node2"]
        == problems["failed", "model files", "node3"]
        == "config.json missing"
    )
    assert "refuses the credentials" in problems["failed", "tracking", "all nodes"]

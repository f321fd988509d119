"""The Slurm script on two pseudo-nodes: it reaches its time limit, goes back into the queue, and ends the run as if it had not.

`srun` and `scontrol` are stand-ins for Slurm's; Ray, `rlhf` and the script are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.testbed import Testbed
from tests.faults.runs import COMMAND, SMOKE, newest_checkpoint
from tests.nodes.runs import largest_difference, metrics, undisturbed

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/clusters/slurm.sh"
SETTINGS = ["--tracking.uri", "null", "--sft.epochs", "6"]
pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]

# Runs a command on a node and hands SIGTERM on to it: `on_node.py NODE COMMAND …`
ON_NODE = """
import os, signal, sys
from pathlib import Path
import psutil
from launch.testbed import Testbed

testbed = Testbed(Path(os.environ["TESTBED"]))
own = {key: os.environ[key] for key in ("RAY_AUTH_TOKEN_PATH",) if key in os.environ}
process = testbed.popen(int(sys.argv[1]), sys.argv[2:], own)

def hand_on(number, _):
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(number)

signal.signal(signal.SIGTERM, hand_on)
sys.exit(process.wait())
"""
SRUN = """#!/usr/bin/env bash
nodes=(1 2)
while [[ $1 == --* ]]; do
    case $1 in
    --nodelist=*) nodes=("${1#--nodelist=node}") ;;
    --exclude=*) nodes=(2) ;;
    esac
    shift
done
for node in "${nodes[@]}"; do "$PYTHON" "$TESTBED/on_node.py" "$node" "$@" & done
trap 'kill $(jobs -p)' TERM
wait
"""
STAND_INS = {
    "srun": SRUN,
    "scontrol": '#!/usr/bin/env bash\necho "$*" >>"$TESTBED/scontrol.log"\n[[ $1 != show ]] || printf "node1\\nnode2\\n"\n',
    "ray": '#!/usr/bin/env bash\nexec "${PYTHON%/*}/ray" "$@"\n',
    "python": '#!/usr/bin/env bash\nexec "$PYTHON" "$TESTBED/on_node.py" 1 "$PYTHON" "$@"\n',
    "rlhf": '#!/usr/bin/env bash\nexec "$PYTHON" "$TESTBED/on_node.py" 1 "$PYTHON" -c "$RLHF" "$@"\n',
}


@pytest.fixture(scope="module")
def nodes(machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Two nodes without Ray. The project's folder, with everything that the script calls, is the shared one."""
    with Testbed(tmp_path_factory.mktemp("testbed")).up_without_ray(2) as testbed:
        (testbed.folder / "on_node.py").write_text(ON_NODE)
        bin_ = testbed.shared / ".venv/bin"
        bin_.mkdir(parents=True)
        for name, text in STAND_INS.items():
            (bin_ / name).write_text(text)
            (bin_ / name).chmod(0o755)
        yield testbed


def job(testbed: Testbed, *command: str) -> subprocess.Popen[str]:
    """The script as Slurm starts it on the first node of a job."""
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1"}
    own = {"TESTBED": str(testbed.folder), "PYTHON": sys.executable, "RLHF": COMMAND, "PYTHONPATH": str(ROOT)}
    path = {"PATH": f"{testbed.shared / '.venv/bin'}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *command],
        cwd=testbed.shared,
        env=os.environ | slurm | own | path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_step(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    while process.poll() is None:
        time.sleep(0.2)
        progress = folder / "progress.json"
        if progress.exists() and json.loads(progress.read_text())["done"] >= step:
            return
    pytest.fail(str(process.communicate()[0]))


def test_a_job_that_reaches_its_time_limit_goes_back_into_the_queue_and_on(nodes: Testbed, tmp_path: Path) -> None:
    command = ["run", str(SMOKE), "--pipeline", "[sft]", "--hardware.placement_timeout_s", "120", *SETTINGS]
    folder, log = nodes.shared / "runs/smoke/sft", nodes.folder / "scontrol.log"
    first = job(nodes, *command)
    wait_for_step(folder, first, 3)
    first.send_signal(signal.SIGUSR1)  # what --signal=B:USR1 makes Slurm do
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 143, output
    assert log.read_text().splitlines()[-1] == "requeue 4711"
    stopped = newest_checkpoint(folder)

    for node in (1, 2):  # Slurm ends all that is left of a job
        nodes.run(node, [str(Path(sys.executable).with_name("ray")), "stop", "--force"])
    second = job(nodes, *command)
    output, _ = second.communicate(timeout=500)
    assert second.returncode == 0, output
    assert log.read_text().count("requeue") == 1
    assert not list(nodes.shared.glob("runs/*.token"))

    whole = undisturbed(tmp_path, *SETTINGS)
    assert 3 <= stopped < len(metrics(whole)["sft/loss"])
    assert metrics(folder) == metrics(whole)
    assert largest_difference(folder, whole) == 0

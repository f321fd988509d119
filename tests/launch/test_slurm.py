"""The Slurm script, with stand-ins for Slurm, Ray and rlhf that write down what they were called with."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/clusters/slurm.sh"
CLUSTER = yaml.safe_load((ROOT / "configs/hardware/cluster-64.yaml").read_text())

CALLED = 'echo "$(basename "$0") $RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH") $*" >>"$CALLS"\n'
STAND_INS = {
    "scontrol": 'if [[ $1 == show ]]; then printf "n%s\\n" $(seq "$NODES"); else echo "scontrol - - $*" >>"$CALLS"; fi\n',
    "srun": CALLED + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "ray": CALLED + "exec sleep 60\n",
    "rlhf": 'trap "kill \\$!; exit 143" TERM\n' + CALLED + '[[ $RLHF_EXIT != wait ]] || { sleep 60 & wait; }\n'
    'exit "$RLHF_EXIT"\n',
    "python": 'if [[ $1 == - ]]; then until (($(grep -c ^ray "$CALLS") == (NODES > 1) + 1)); do sleep 0.05; done\n'
    'else echo secret; fi\n',
}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder in which everything that the script calls is a stand-in."""
    folder = tmp_path / ".venv/bin"
    folder.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / name).chmod(0o755)
    (tmp_path / "calls").touch()
    return tmp_path


def job(project: Path, nodes: int, rlhf: str, *command: str) -> subprocess.Popen[str]:
    """The script under way. `rlhf`: its exit code, or "wait" for one that runs until it is asked to stop."""
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_CPUS_PER_TASK": "32"}
    settings = {"NODES": str(nodes), "RLHF_EXIT": rlhf, "CALLS": str(project / "calls")}
    environment = os.environ | slurm | settings | {"PATH": f"{project / '.venv/bin'}:{os.environ['PATH']}"}
    script = ["bash", str(SCRIPT), *command]
    return subprocess.Popen(
        script, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def calls(project: Path) -> list[list[str]]:
    """The words of every call: who, authentication, token, arguments."""
    return [line.split() for line in (project / "calls").read_text().splitlines()]


def submit(project: Path, nodes: int, exit_code: int, *command: str) -> tuple[int, list[list[str]]]:
    """Exit code of the job, and what it called."""
    process = job(project, nodes, str(exit_code), *command)
    process.communicate(timeout=30)
    return process.returncode, calls(project)


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_stop_lets_rlhf_end_and_only_the_time_limit_puts_the_job_back(
    project: Path, number: int, requeued: bool
) -> None:
    process = job(project, 2, "wait", "run", "quickstart")
    while not any(words[0] == "rlhf" for words in calls(project)):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert (["scontrol", "-", "-", "requeue", "4711"] in calls(project)) == requeued


def test_a_job_is_stopped_before_its_limit_and_may_go_back_into_the_queue() -> None:
    text = SCRIPT.read_text()
    assert "#SBATCH --signal=B:USR1@900\n" in text and "#SBATCH --requeue\n" in text
    assert "#SBATCH --open-mode=append\n" in text  # or the second part of the job would remove the log of the first


def test_a_dry_run_prints_what_the_job_calls_and_calls_nothing(project: Path) -> None:
    command = ["run", "llama2-chat", "--data.root", "a folder"]
    process = job(project, 8, "0", "--dry-run", *command)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and calls(project) == []
    said = [
        shlex.split(line.removesuffix("&")) for line in output.splitlines() if line.startswith(("srun", str(project)))
    ]
    _, made = submit(project, 8, 0, *command)
    assert sorted(" ".join(words[1:]) for words in said) == sorted(
        " ".join(words[3:]) for words in made if words[0] in ("srun", "rlhf")
    )
    assert not (project / "runs/ray-4711.token").exists()


@pytest.mark.parametrize("code", [0, 6])
def test_a_slurm_job_ends_with_the_exit_code_of_rlhf(project: Path, code: int) -> None:
    assert submit(project, 8, code, "run", "llama2-chat")[0] == code


def test_a_slurm_job_hands_its_arguments_and_its_cluster_to_rlhf(project: Path) -> None:
    _, made = submit(project, 8, 0, "run", "llama2-chat", "--data.root", "FOLDER")
    driver = next(words for words in made if words[0] == "rlhf")
    assert driver[3:7] == ["run", "llama2-chat", "--data.root", "FOLDER"]
    assert driver[-2:] == ["--hardware.ray_address", "n1:24711"]


@pytest.mark.parametrize(
    ("server", "given", "uri"),
    [("", "", "null"), ("http://m:5000", "", "http://m:5000"), ("http://m:5000", "http://n:1", "http://n:1")],
)
def test_a_slurm_job_keeps_no_database_on_shared_storage(
    project: Path, monkeypatch: pytest.MonkeyPatch, server: str, given: str, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    _, made = submit(project, 1, 0, "run", "quickstart", *(["--tracking.uri", given] if given else []))
    driver = next(words for words in made if words[0] == "rlhf")
    assert driver.count("--tracking.uri") == 1 and driver[driver.index("--tracking.uri") + 1] == uri


def test_a_slurm_job_starts_one_head_and_the_other_nodes(project: Path) -> None:
    _, made = submit(project, 8, 0, "run", "llama2-chat")
    steps = sorted(" ".join(words) for words in made if words[0] == "srun")
    assert [re.findall(r"--(?:nodes|ntasks|nodelist|exclude|address|port)=\S+|--head", step) for step in steps] == [
        ["--nodes=1", "--ntasks=1", "--nodelist=n1", "--head", "--port=24711"],
        ["--nodes=7", "--ntasks=7", "--exclude=n1", "--address=n1:24711"],
    ]


def test_a_slurm_job_of_one_node_starts_a_head_alone(project: Path) -> None:
    _, made = submit(project, 1, 0, "run", "quickstart")
    assert [words[0] for words in made].count("srun") == 1


def test_everyone_in_a_slurm_job_has_its_token_which_then_goes(project: Path) -> None:
    _, made = submit(project, 8, 0, "run", "llama2-chat")
    assert {tuple(words[:3]) for words in made} == {(who, "token", "secret") for who in ("srun", "ray", "rlhf")}
    assert not list((project / "runs").glob("*.token"))


def test_a_slurm_job_has_the_whole_memory_of_its_nodes() -> None:
    """Without it Slurm gives memory by the number of CPUs where that is its default."""
    assert "#SBATCH --mem=0\n" in SCRIPT.read_text()


def test_a_slurm_job_has_the_room_of_its_workers() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", SCRIPT.read_text(), re.MULTILINE))
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == CLUSTER["workers"] * CLUSTER["gpus_per_worker"]
    assert int(asked["nodes"]) * int(asked["cpus-per-task"]) >= CLUSTER["workers"] * CLUSTER["cpus_per_worker"]

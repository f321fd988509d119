"""The files in launch/clusters, as far as they can be tried without a cluster."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import _parser
from launch.settings import load

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "launch/clusters"
CLUSTER = yaml.safe_load((ROOT / "configs/hardware/cluster-64.yaml").read_text())

# --- Slurm: the real script, with stand-ins for Slurm, Ray and rlhf that write down what they were called with ---------

CALLED = 'echo "$(basename "$0") $RAY_AUTH_MODE $(cat "$RAY_AUTH_TOKEN_PATH") $*" >>"$CALLS"\n'
STAND_INS = {
    "scontrol": 'printf "n%s\\n" $(seq "$NODES")\n',
    "srun": CALLED + 'while [[ $1 == --* ]]; do shift; done\nexec "$@"\n',
    "ray": CALLED + "exec sleep 60\n",
    "rlhf": CALLED + 'exit "$RLHF_EXIT"\n',
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


def submit(project: Path, nodes: int, exit_code: int, *command: str) -> tuple[int, list[list[str]]]:
    """Exit code of the job, and the words of every call: who, authentication, token, arguments."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_CPUS_PER_TASK": "32"}
    settings = {"NODES": str(nodes), "RLHF_EXIT": str(exit_code), "CALLS": str(project / "calls")}
    environment = os.environ | job | settings | {"PATH": f"{project / '.venv/bin'}:{os.environ['PATH']}"}
    script = ["bash", str(CLUSTERS / "slurm.sh"), *command]
    done = subprocess.run(script, cwd=project, env=environment, check=False, capture_output=True, text=True, timeout=30)
    return done.returncode, [line.split() for line in (project / "calls").read_text().splitlines()]


@pytest.mark.parametrize("code", [0, 6])
def test_a_slurm_job_ends_with_the_exit_code_of_rlhf(project: Path, code: int) -> None:
    assert submit(project, 8, code, "run", "llama2-chat")[0] == code


def test_a_slurm_job_hands_its_arguments_and_its_cluster_to_rlhf(project: Path) -> None:
    _, calls = submit(project, 8, 0, "run", "llama2-chat", "--data.root", "FOLDER")
    driver = next(words for words in calls if words[0] == "rlhf")
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
    _, calls = submit(project, 1, 0, "run", "quickstart", *(["--tracking.uri", given] if given else []))
    driver = next(words for words in calls if words[0] == "rlhf")
    assert driver.count("--tracking.uri") == 1 and driver[driver.index("--tracking.uri") + 1] == uri


def test_a_slurm_job_starts_one_head_and_the_other_nodes(project: Path) -> None:
    _, calls = submit(project, 8, 0, "run", "llama2-chat")
    steps = sorted(" ".join(words) for words in calls if words[0] == "srun")
    assert [re.findall(r"--(?:nodes|ntasks|nodelist|exclude|address|port)=\S+|--head", step) for step in steps] == [
        ["--nodes=1", "--ntasks=1", "--nodelist=n1", "--head", "--port=24711"],
        ["--nodes=7", "--ntasks=7", "--exclude=n1", "--address=n1:24711"],
    ]


def test_a_slurm_job_of_one_node_starts_a_head_alone(project: Path) -> None:
    _, calls = submit(project, 1, 0, "run", "quickstart")
    assert [words[0] for words in calls].count("srun") == 1


def test_everyone_in_a_slurm_job_has_its_token_which_then_goes(project: Path) -> None:
    _, calls = submit(project, 8, 0, "run", "llama2-chat")
    assert {tuple(words[:3]) for words in calls} == {(who, "token", "secret") for who in ("srun", "ray", "rlhf")}
    assert not list((project / "runs").glob("*.token"))


def test_a_slurm_job_has_the_whole_memory_of_its_nodes() -> None:
    """Without it Slurm gives memory by the number of CPUs where that is its default."""
    assert "#SBATCH --mem=0\n" in (CLUSTERS / "slurm.sh").read_text()


def test_a_slurm_job_has_the_room_of_its_workers() -> None:
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\d+)$", (CLUSTERS / "slurm.sh").read_text(), re.MULTILINE))
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == CLUSTER["workers"] * CLUSTER["gpus_per_worker"]
    assert int(asked["nodes"]) * int(asked["cpus-per-task"]) >= CLUSTER["workers"] * CLUSTER["cpus_per_worker"]


# --- Ray's cluster launcher -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ray_cluster() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "ray-cluster.yaml").read_text())


def refused_by_ray(config: dict[str, Any]) -> str | None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(config))
    except Exception as error:  # noqa: BLE001  Ray raises what its schema checker raises
        return str(error)
    return None


def test_ray_accepts_its_cluster_file(ray_cluster: dict[str, Any]) -> None:
    assert refused_by_ray(ray_cluster) is None
    assert refused_by_ray(ray_cluster | {"worker_start_commands": []})


def test_every_machine_of_the_cluster_file_is_started(ray_cluster: dict[str, Any]) -> None:
    others = len(ray_cluster["provider"]["worker_ips"])
    assert ray_cluster["min_workers"] == ray_cluster["max_workers"] == others
    assert (others + 1) * 8 == CLUSTER["workers"]


def nodes_to_launch(cluster: dict[str, Any], second: bool) -> int:
    """What the first or the second autoscaler of Ray starts beside the head."""
    from ray.autoscaler._private.resource_demand_scheduler import _add_min_workers_nodes
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.schema import AutoscalerInstance
    from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus  # pyright: ignore[reportAttributeAccessIssue]
    from ray.core.generated.instance_manager_pb2 import Instance, NodeKind  # pyright: ignore[reportAttributeAccessIssue]

    prepared = prepare_config(cluster)
    kind = prepared["head_node_type"]
    if not second:
        types, most = prepared["available_node_types"], prepared["max_workers"]
        return _add_min_workers_nodes([{}], {kind: 1}, types, most, kind, [], lambda *_: None)[2][kind]
    config = AutoscalingConfig(cluster, skip_content_hash=True)
    node = NodeState(ray_node_type_name=kind, status=NodeStatus.RUNNING, instance_id="head", node_id=b"head")
    instance = Instance(
        instance_id="0",
        status=Instance.RAY_RUNNING,
        instance_type=kind,
        cloud_instance_id="head",
        node_kind=NodeKind.HEAD,
        launch_config_hash=(config.get_node_type_configs() or {})[kind].launch_config_hash,
    )
    head = AutoscalerInstance(cloud_instance_id="head", ray_node=node, im_instance=instance)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs() or {},
        max_num_nodes=config.get_max_num_nodes(),
        current_instances=[head],
    )
    reply = ResourceDemandScheduler(None).schedule(request)  # type: ignore[arg-type]
    return sum(one.count for one in reply.to_launch)


def test_the_autoscaler_that_starts_all_machines_is_chosen(ray_cluster: dict[str, Any]) -> None:
    """The second one counts the head. Once it does not, the variable can go."""
    (start,) = [command for command in ray_cluster["head_start_ray_commands"] if "ray start" in command]
    assert "RAY_enable_autoscaler_v2=0 " in start
    others = len(ray_cluster["provider"]["worker_ips"])
    assert nodes_to_launch(ray_cluster, second=False) == others
    assert nodes_to_launch(ray_cluster, second=True) == others - 1


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_is_started_with_the_token_that_the_head_makes(ray_cluster: dict[str, Any], role: str) -> None:
    (start,) = [command for command in ray_cluster[f"{role}_start_ray_commands"] if "ray start" in command]
    token = re.search(r"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=(\S+) ", start)
    assert token and f"> {token[1]})" in ray_cluster["head_setup_commands"][0]


# --- KubeRay ----------------------------------------------------------------------------------------------------------

# Fields of KubeRay 1.6, from its API reference; Kubernetes drops or refuses others.
POD_GROUP = {"rayStartParams", "template", "resources", "labels"}
FIELDS = {
    "job": {"activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "managedBy"}
    | {"entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "metadata", "rayClusterSpec"}
    | {"runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate"}
    | {"suspend", "ttlSecondsAfterFinished"},
    "cluster": {"authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "managedBy"}
    | {"headGroupSpec", "headServiceAnnotations", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"},
    "head": POD_GROUP | {"enableIngress", "headService", "serviceType"},
    "workers": POD_GROUP
    | {"groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "replicas", "scaleStrategy"}
    | {"suspend"},
}


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "kuberay-job.yaml").read_text())["spec"]


def misspelt(job: dict[str, Any]) -> Iterator[str]:
    cluster = job["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    for kind, spec in (("job", job), ("cluster", cluster), ("head", cluster["headGroupSpec"]), ("workers", workers)):
        yield from spec.keys() - FIELDS[kind]


def test_every_field_of_the_job_is_one_of_kuberay(job: dict[str, Any]) -> None:
    assert list(misspelt(job)) == []


def test_the_pods_have_the_room_of_the_workers(job: dict[str, Any]) -> None:
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert workers["replicas"] * int(limits["nvidia.com/gpu"]) == CLUSTER["workers"] * CLUSTER["gpus_per_worker"]
    assert workers["replicas"] * int(limits["cpu"]) >= CLUSTER["workers"] * CLUSTER["cpus_per_worker"]
    assert workers["minReplicas"] == workers["maxReplicas"] == workers["replicas"]


def test_every_volume_that_is_mounted_is_declared(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_entrypoint_is_a_run_that_loads(job: dict[str, Any]) -> None:
    args, overrides = _parser().parse_known_args(shlex.split(job["entrypoint"])[1:])
    assert load(args.runfile, overrides).hardware.ray_address == "auto"


def test_the_ray_of_the_job_is_the_one_that_is_pinned(job: dict[str, Any]) -> None:
    assert f"\nray=={job['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_operator_makes_a_token(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}

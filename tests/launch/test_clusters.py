"""The files in launch/clusters, as far as they can be tried without a cluster."""

from __future__ import annotations

import re
import shlex
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


@pytest.mark.parametrize("file", sorted(CLUSTERS.glob("ray-*.yaml")), ids=lambda file: file.stem)
def test_ray_accepts_its_cluster_files(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    assert refused_by_ray(config) is None
    assert refused_by_ray(config | {"worker_start_commands": []})


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
        return sum(_add_min_workers_nodes([{}], {kind: 1}, types, most, kind, [], lambda *_: None)[2].values())
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


def test_volume_and_secrets_are_those_of_the_other_file(job: dict[str, Any]) -> None:
    storage = (CLUSTERS / "kuberay-storage.yaml").read_text()
    claim, cluster = yaml.safe_load(storage), job["rayClusterSpec"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (secret,) = re.findall(r"create secret generic (\S+)", storage)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        claims = [one["persistentVolumeClaim"]["claimName"] for one in pod["volumes"] if "persistentVolumeClaim" in one]
        assert claims == [claim["metadata"]["name"]]
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": secret, "optional": True}}]


def test_the_pods_have_the_user_of_the_image_and_may_run_on_gpu_and_spot_nodes(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    (user,) = re.findall(r"^USER (\d+)$", (CLUSTERS / "Dockerfile").read_text(), re.MULTILINE)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["template"]["spec"]["securityContext"].values()) == {int(user)}
    (workers,) = cluster["workerGroupSpecs"]
    tolerated = {one["key"] for one in workers["template"]["spec"]["tolerations"]}
    assert {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= tolerated


def test_the_entrypoint_is_a_run_that_loads(job: dict[str, Any]) -> None:
    args, overrides = _parser().parse_known_args(shlex.split(job["entrypoint"])[1:])
    assert load(args.runfile, overrides).hardware.ray_address == "auto"


def test_the_ray_of_the_job_is_the_one_that_is_pinned(job: dict[str, Any]) -> None:
    assert f"\nray=={job['rayClusterSpec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()


def test_the_operator_makes_a_token(job: dict[str, Any]) -> None:
    assert job["rayClusterSpec"]["authOptions"] == {"mode": "token"}

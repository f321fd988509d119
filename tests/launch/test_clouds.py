"""Machines of clouds: what Ray's cluster launcher, SkyPilot and Docker are told, as far as that can be checked offline."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import _parser
from launch.settings import load
from rlhf.planning import machine_named, plan_run, shape_of
from tests.launch.test_clusters import nodes_to_launch

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "launch/clusters"
CLUSTER = yaml.safe_load((ROOT / "configs/hardware/cluster-64.yaml").read_text())
CLOUDS = ("aws", "gcp", "azure")
# From the pages of the clouds: GPUs, and main memory in bytes. All of these GPUs are A100 of 80 GB.
MACHINES = {
    "p4de.24xlarge": (8, 1152 * 2**30),
    "a2-ultragpu-8g": (8, 1360 * 2**30),
    "Standard_ND96amsr_A100_v4": (8, 1900 * 2**30),
}


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / f"ray-{request.param}.yaml").read_text())


def of_node(cloud: dict[str, Any], kind: str) -> dict[str, Any]:
    config = cloud["available_node_types"][kind]["node_config"]
    return config.get("azure_arm_parameters", config)


def is_spot(config: dict[str, Any]) -> bool:
    markets = (config.get("InstanceMarketOptions", {}).get("MarketType"), config.get("priority", "").lower())
    return "spot" in markets or {"preemptible": True} in config.get("scheduling", [])


def machine_type(config: dict[str, Any]) -> str:
    return next(config[key] for key in ("InstanceType", "machineType", "vmSize") if key in config)


def test_workers_are_spot_machines_and_the_driver_is_not(cloud: dict[str, Any]) -> None:
    assert is_spot(of_node(cloud, "gpu")) and not is_spot(of_node(cloud, "head"))
    assert cloud["head_node_type"] == "head"


def test_the_machines_have_the_gpus_of_the_run(cloud: dict[str, Any]) -> None:
    workers = cloud["available_node_types"]["gpu"]
    gpus, _ = MACHINES[machine_type(of_node(cloud, "gpu"))]
    assert workers["resources"]["GPU"] == gpus
    assert workers["min_workers"] == workers["max_workers"] == cloud["max_workers"]
    assert workers["min_workers"] * gpus == CLUSTER["workers"] * CLUSTER["gpus_per_worker"]
    assert workers["resources"]["CPU"] >= gpus * CLUSTER["cpus_per_worker"]


@pytest.mark.parametrize("hardware", ["cluster-64", "gpu-8-offload"])
def test_llama_2_13b_fits_into_the_machines(cloud: dict[str, Any], hardware: str) -> None:
    _, memory = MACHINES[machine_type(of_node(cloud, "gpu"))]
    config = load("llama2-chat", ["--hardware", hardware])
    shape = shape_of(config.model)
    assert shape and round(shape.parameters / 1e9) == 13
    machine = dataclasses.replace(machine_named("a100-80g"), host_memory=memory)
    assert plan_run(config, shape, machine).fits


@pytest.mark.parametrize("second", [False, True])
def test_all_machines_are_started_beside_the_head(cloud: dict[str, Any], second: bool) -> None:
    assert nodes_to_launch(cloud, second) == 8


def test_everyone_starts_ray_with_the_token_that_the_head_makes(cloud: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        (start,) = [command for command in cloud[f"{role}_start_ray_commands"] if "ray start" in command]
        token = re.search(r"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=(\S+) ", start)
        assert token and any(f"> {token[1]})" in command for command in cloud["head_setup_commands"])
    assert "--num-cpus=0" in cloud["head_start_ray_commands"][1]  # no worker beside the driver


def test_no_file_holds_a_secret_or_opens_the_dashboard() -> None:
    for file in CLUSTERS.iterdir():
        text = file.read_text()
        assert "dashboard-host" not in text, file
        assert not re.search(r"hf_\w{20}|(?:AKIA|ASIA)\w{16}|(?:TOKEN|PASSWORD)=(?![\"$<\w/]*\$)[0-9a-f]{16}", text), (
            file
        )


def scripts() -> Iterator[tuple[str, str]]:
    """The shell of every file, by where it is."""
    for name in (*CLOUDS, "cluster"):
        for key, value in yaml.safe_load((CLUSTERS / f"ray-{name}.yaml").read_text()).items():
            if key.endswith("_commands"):
                yield f"ray-{name}: {key}", "\n".join(value)
    task = yaml.safe_load((CLUSTERS / "sky.yaml").read_text())
    yield from ((f"sky: {key}", task[key]) for key in ("setup", "run"))
    yield "slurm.sh", (CLUSTERS / "slurm.sh").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
@pytest.mark.parametrize(("where", "text"), scripts(), ids=lambda value: value[:40].partition("\n")[0])
def test_shellcheck_finds_nothing(where: str, text: str) -> None:
    # SC2239, SC2088: commands of the launcher; Ray expands ~ in its own option.
    command = ["shellcheck", "--shell=bash", "--severity=info", "--exclude=SC2088", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{where}\n{done.stdout}"


# --- images -----------------------------------------------------------------------------------------------------------

IMAGES = sorted(CLUSTERS.glob("Dockerfile*"))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_hadolint_finds_nothing(file: Path) -> None:
    done = subprocess.run(["hadolint", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_an_image_has_the_pinned_versions(file: Path) -> None:
    text = file.read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = re.search(r"^FROM python:(3\.\d+)\.\d+-", text, re.MULTILINE)
    assert python and f"Programming Language :: Python :: {python[1]}" in project["classifiers"]
    assert "COPY constraints.txt" in text and (ROOT / "constraints.txt").is_file()
    assert all("-c /tmp/constraints.txt" in line for line in text.split("\n") if "pip install" in line)
    assert re.search(r"^USER \d+$", text, re.MULTILINE)


def test_the_build_for_gpus_has_the_torch_of_the_constraints() -> None:
    text = (CLUSTERS / "Dockerfile").read_text()
    (find,) = re.findall(r"version=\$\((sed .*?) /tmp/constraints.txt\)", text)
    done = subprocess.run(
        [*shlex.split(find), str(ROOT / "constraints.txt")], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", done.stdout)


# --- SkyPilot ---------------------------------------------------------------------------------------------------------

# Fields of a task and of its resources in SkyPilot 0.14; it refuses others.
TASK = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "file_mounts",
    "setup",
    "run",
    "envs",
    "secrets",
    "volumes",
    "config",
}
RESOURCES = {"accelerators", "any_of", "memory", "cpus", "disk_size", "disk_tier", "use_spot", "job_recovery", "infra"}


@pytest.fixture(scope="module")
def sky() -> dict[str, Any]:
    return yaml.safe_load((CLUSTERS / "sky.yaml").read_text())


def test_every_field_is_one_of_skypilot(sky: dict[str, Any]) -> None:
    assert sky.keys() <= TASK and sky["resources"].keys() <= RESOURCES
    assert all(one.keys() <= RESOURCES for one in sky["resources"]["any_of"])


def test_skypilot_gives_the_run_its_gpus_and_no_secret_is_in_the_file(sky: dict[str, Any]) -> None:
    for one in sky["resources"]["any_of"]:
        assert sky["num_nodes"] * int(one["accelerators"].rpartition(":")[2]) == CLUSTER["workers"]
    assert set(sky["secrets"].values()) == {None} and sky["resources"]["use_spot"]


def test_the_command_of_skypilot_is_a_run_that_loads(sky: dict[str, Any]) -> None:
    (line,) = [line for line in sky["run"].replace("\\\n", " ").splitlines() if line.startswith("rlhf run")]
    words = shlex.split(re.sub(r"\$\{?(\w+)\}?", lambda name: str((sky["envs"] | {"head": "10.0.0.1"})[name[1]]), line))
    args, overrides = _parser().parse_known_args(words[1:])
    config = load(args.runfile, overrides)
    assert config.hardware.workers == 64 and config.hardware.ray_address == "10.0.0.1:6399"

"""A base model on every node, with a stand-in for Ray whose nodes do what a test says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import base_model
from launch.settings import load
from rlhf.config import RunConfig
from rlhf.errors import UserError
from rlhf.models import folders

SMOKE = Path(__file__).parents[1] / "smoke.yaml"


class Ray:
    """Runs every task at once; what was started last is the first to end."""

    def __init__(self) -> None:
        self.known = [self.node("one"), self.node("two")]
        self.ran_on: list[str] = []

    @staticmethod
    def node(name: str, alive: bool = True, cpus: float = 4.0, gpus: float = 0.0) -> dict[str, Any]:
        resources = {"CPU": cpus, "GPU": gpus}
        return {"NodeID": name.upper(), "NodeManagerHostname": name, "Alive": alive, "Resources": resources}

    def nodes(self) -> list[dict[str, Any]]:
        return self.known

    def remote(self, function: Callable[..., Any]) -> Any:
        def start(node: str, *arguments: Any) -> Any:
            self.ran_on.append(node)
            return (node, function(*arguments))

        def options(num_cpus: int, scheduling_strategy: str) -> Any:
            return SimpleNamespace(remote=lambda *arguments: start(scheduling_strategy, *arguments))

        return SimpleNamespace(options=options)

    def wait(self, tasks: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return tasks[-1:], tasks[:-1]

    def get(self, task: Any) -> Any:
        return task[1]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    own = Ray()
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    modules = {"ray": own, "ray.util": SimpleNamespace(), "ray.util.scheduling_strategies": strategies}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return own


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    return load(str(SMOKE), ["--model.path", "owner/name", "--runs_dir", str(tmp_path), "--hardware.workers", "2"])


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(folder that was looked for, the token at that time); `one` is an adapter of `two`, which is one of `three`."""
    looked: list[tuple[str, str]] = []

    def find(name: str) -> Path:
        looked.append((name, os.environ["HF_TOKEN"]))
        return Path(name)

    bases = {"one": "two", "two": "three"}
    monkeypatch.setattr(folders, "find_model", find)
    monkeypatch.setattr(folders, "is_adapter", lambda folder: folder.name in bases)
    monkeypatch.setattr(folders, "adapter_base", lambda folder: find(bases[folder.name]))
    monkeypatch.setenv("HF_TOKEN", "")  # and as before in the end
    return looked


def test_every_node_that_takes_workers_downloads_it(ray: Ray, config: RunConfig, fetched: list[Any]) -> None:
    ray.known += [ray.node("dead", alive=False), ray.node("full", cpus=0)]
    base_model.fetch_on_nodes(config, "sft", {"HF_TOKEN": "hf_own"})
    assert ray.ran_on == ["ONE", "TWO"]
    assert fetched == [("owner/name", "hf_own")] * 2


def test_a_node_without_a_gpu_takes_no_worker_that_needs_one(ray: Ray, config: RunConfig, fetched: list[Any]) -> None:
    ray.known += [ray.node("three", gpus=1)]
    hardware = config.hardware.model_copy(update={"gpus_per_worker": 1})
    base_model.fetch_on_nodes(config.model_copy(update={"hardware": hardware}), "sft", {})
    assert ray.ran_on == ["THREE"]


def test_a_node_that_cannot_have_it_is_named(ray: Ray, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        if len(ray.ran_on) == 1:
            raise UserError("the hub cannot be reached", 8)

    monkeypatch.setattr(base_model, "_fetch", fail)
    with pytest.raises(UserError, match="^one: the hub cannot be reached$") as caught:
        base_model.fetch_on_nodes(config, "sft", {})
    assert caught.value.exit_code == 8


def test_a_model_of_this_disk_is_not_fetched(ray: Ray, config: RunConfig, fetched: list[Any], tmp_path: Path) -> None:
    (tmp_path / "owner/name").mkdir(parents=True)
    base_model.fetch_on_nodes(config, "sft", {})
    assert ray.ran_on == []
    (tmp_path / "owner/name/adapter_config.json").touch()  # its base may be of the hub
    base_model.fetch_on_nodes(config, "sft", {})
    assert ray.ran_on == ["ONE", "TWO"]


def test_bases_of_adapters_are_fetched_down_to_the_last(config: RunConfig, fetched: list[Any]) -> None:
    base_model.fetch_here(config.model_copy(update={"model": config.model.model_copy(update={"path": "one"})}))
    assert [name for name, _ in fetched] == ["one", "two", "three"]
    fetched.clear()
    base_model.fetch_here(config.model_copy(update={"model": config.model.model_copy(update={"path": "tiny"})}))
    assert fetched == []

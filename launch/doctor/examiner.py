"""A process on each node that does there what the doctor asks. Only this file and `examine.py` know that it is Ray's."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.doctor import facts, network, storage
from launch.doctor.facts import NodeFacts
from rlhf.config import RunConfig


class Examiner:
    """The methods that are called on a node."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._config = RunConfig.model_validate(settings)
        self._store: Any = None

    def name(self) -> str:
        return socket.gethostname()

    def now(self) -> float:
        return time.time()

    def facts(self, folder: Path) -> NodeFacts:
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(self._config.model.path)
        return facts.gather(folder, model if model.is_absolute() else None)

    def write(self, folder: Path, name: str, text: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write(folder, name, text)

    def read(self, folder: Path, names: list[str], text: str) -> dict[str, float | None]:
        return storage.read(folder, names, text)

    def reach(self) -> tuple[str, str] | None:
        from rlhf.tracking import why_unreachable

        return why_unreachable(self._config.tracking)

    def serve(self) -> tuple[str, int]:
        """Address of a store at which ranks meet, open as long as this process is."""
        import ray.util
        import torch.distributed as dist

        address = ray.util.get_node_ip_address()
        self._store = self._store or dist.TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return address, self._store.port

    def all_reduce(
        self, address: tuple[str, int], session: str, rank: int, size: int, timeout_s: float
    ) -> network.Timing:
        return network.all_reduce(address, session, rank, size, self._config.hardware.gpus_per_worker > 0, timeout_s)


class Examiners:
    """One `Examiner` on each node of the cluster that this process is connected with. This process's node is the first."""

    def __init__(self, config: RunConfig) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        alive = sorted(
            (node for node in ray.nodes() if node["Alive"]),
            key=lambda node: (node["NodeID"] != here, node["NodeManagerHostname"]),
        )
        self.resources: list[Mapping[str, float]] = [node["Resources"] for node in alive]
        able = [node for node in alive if node["NodeID"] == here or node["Resources"].get("CPU")]
        hosts = names([(node["NodeManagerHostname"], node["NodeManagerAddress"]) for node in able])
        remote, settings = ray.remote(Examiner), config.model_dump(mode="json")
        on_gpu = config.hardware.gpus_per_worker > 0
        self._actors: dict[str, Any] = {
            name: remote.options(
                num_cpus=0,
                num_gpus=1 if on_gpu and node["Resources"].get("GPU") else 0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote(settings)
            for name, node in zip(hosts, able, strict=True)
        }

    @property
    def names(self) -> list[str]:
        return list(self._actors)

    def ask(self, call: Callable[[str, Any], Any], timeout_s: float) -> dict[str, Any]:
        """Node → what `call(node, actor)` gave, or the exception; TimeoutError where there was no answer."""
        return self.ask_some({name: call(name, actor) for name, actor in self._actors.items()}, timeout_s)

    @staticmethod
    def ask_some(calls: Mapping[Any, Any], timeout_s: float) -> dict[Any, Any]:
        import ray

        done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
        answers: dict[Any, Any] = {}
        for key, reference in calls.items():
            try:
                answers[key] = (
                    ray.get(reference) if reference in done else TimeoutError(f"no answer in {timeout_s:.0f} s")
                )
            except Exception as error:  # noqa: BLE001  what a node raised, or Ray where it is lost
                answers[key] = error
        return answers

    def drop(self, name: str) -> None:
        """Asks this node no more."""
        del self._actors[name]

    def actor(self, name: str) -> Any:
        return self._actors[name]

    def close(self) -> None:
        import ray

        for actor in self._actors.values():
            ray.kill(actor)


def names(nodes: Sequence[tuple[str, str]]) -> list[str]:
    """Of (host, address): the host, and the address beside it where two hosts have one name."""
    hosts = [host for host, _ in nodes]
    return [host if hosts.count(host) == 1 else f"{host} ({address})" for host, address in nodes]

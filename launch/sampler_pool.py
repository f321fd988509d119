"""Samplers on devices of their own: engines of vLLM, actors of Ray, to which the workers send weights and prompts.

Every call names the version of the weights that it wants, and an engine that does not have it fetches it. So Ray may start
a lost engine anew and give it its call again: the same weights sample the same prompts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import HardwareConfig, SamplingConfig
from rlhf.data.batches import PromptBatch, Rollout, select, to
from rlhf.distributed import collectives
from rlhf.distributed.engine import BUCKET_BYTES
from rlhf.errors import UserError
from rlhf.generation.vllm import Capacity, VLLMSampler, described
from rlhf.models import weights_that_fit

RESTARTS = 3  # of an engine
LOOK_S = 1.0
CPU = torch.device("cpu")


class Shelf:
    """An actor with the newest weights: references to buckets in Ray's object store, and their checksum."""

    def __init__(self) -> None:
        self._version, self._buckets, self._checksum = 0, [], 0

    def put(self, version: int, buckets: list[Any], checksum: int) -> None:
        self._version, self._buckets, self._checksum = version, buckets, checksum

    def get(self, version: int) -> tuple[list[Any], int]:
        if version != self._version:
            raise RuntimeError(f"weights of version {version} are asked for, and there are those of {self._version}")
        return self._buckets, self._checksum


class Engine:
    """An actor that samples."""

    def __init__(self, shelf: str, folder: Path, ends: tuple[Sequence[int], int], precision: str, capacity: Capacity):
        import ray

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._shelf, self._version = ray.get_actor(shelf), 0
        self._sampler = VLLMSampler(folder, *ends, precision, device, capacity)

    def fetch(self, version: int) -> None:
        """Takes the weights of this version, if it has others."""
        import ray

        if version != self._version:
            buckets, expected = ray.get(self._shelf.get.remote(version))
            found = Checksum()
            self._sampler.load_weights(found.of(pair for bucket in buckets for pair in ray.get(bucket)))
            if found.value != expected:
                raise RuntimeError(f"weights of version {version} have another checksum than those that were sent")
            self._version = version

    def sample(
        self, version: int, prompts: PromptBatch, settings: SamplingConfig, seed: int, iteration: int
    ) -> tuple[int, Rollout, tuple[int, int]]:
        """The version that sampled, the responses, and the tokens that were computed."""
        self.fetch(version)
        rollout = self._sampler.sample(prompts, settings, seed, iteration)
        return self._version, to(rollout, CPU), self._sampler.positions

    def pid(self) -> int:
        return os.getpid()


@dataclass
class Checksum:
    """Of tensors in their order, bit by bit."""

    value: int = 0

    def of(self, pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Passes them on."""
        for name, tensor in pairs:
            words = tensor.contiguous().view(torch.uint8).reshape(-1)
            whole = words[: len(words) // 8 * 8].view(torch.int64)
            self.value = (self.value * 1_000_003 + int(whole.sum()) + int(words.sum(dtype=torch.int64))) % (1 << 61)
            yield name, tensor


class PooledSampler:
    """The engines of a run, for one rank: as `Sampler`. All ranks must load weights at the same time."""

    def __init__(
        self, engines: Sequence[Any], shelf: Any, folder: Path, stop_ids: Sequence[int], hardware: HardwareConfig
    ) -> None:
        self.stop_ids, self.positions = stop_ids, (0, 0)
        self.dtype = torch.bfloat16 if hardware.precision == "bf16" else torch.float32
        model = described(folder, self.dtype)
        self.size, self._shapes = model.size, model.shapes
        self._engines, self._shelf, self._deadline_s = list(engines), shelf, hardware.collective_timeout_s
        self._version = 0
        self._buckets: list[Any] = []  # they live as long as their owner, the first rank, knows them

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]]) -> int:
        """Sends all weights to the engines, and returns the bytes. UserError (6) where one does not answer."""
        import ray

        self._version += 1
        total, checksum = 0, Checksum()

        def copies() -> Iterator[tuple[str, Tensor]]:
            """On the first rank; the others help to gather. A tensor is gone after its turn."""
            nonlocal total
            for name, tensor in named_tensors:
                total += tensor.numel() * tensor.element_size()
                if collectives.rank() == 0:
                    yield name, tensor.detach().to(CPU, self.dtype, copy=True)

        buckets = [ray.put(bucket) for bucket in _buckets(checksum.of(copies()))]
        collectives.rank_zero_only(lambda: self._publish(buckets, checksum.value), "sending weights to the samplers")
        return total

    def take(self, path: str | Path) -> bool:
        named = weights_that_fit(path, self._shapes)
        if named is not None:
            self.load_weights(named)
        return named is not None

    def sample(
        self,
        prompts: PromptBatch,
        settings: SamplingConfig,
        seed: int,
        iteration: int,
        go_on: Callable[[], None] | None = None,
    ) -> Rollout:
        """The engines of this rank divide its prompts. UserError (6) where one does not answer, or was lost too often."""
        engines, device = self._of_rank(), prompts.tokens_BP.device
        rows = [range(len(prompts.ids_B))[n :: len(engines)] for n in range(len(engines))]
        calls = [
            engine.sample.remote(self._version, to(select(prompts, list(own)), CPU), settings, seed, iteration)
            for engine, own in zip(engines, rows, strict=True)
        ]
        versions, rollouts, positions = zip(*self._answers(calls, go_on), strict=True)
        assert set(versions) == {self._version}, "responses of other weights"
        self.positions = sum(each[0] for each in positions), sum(each[1] for each in positions)
        order = torch.tensor([row for own in rows for row in own]).argsort()
        whole = {each.name: torch.cat([getattr(r, each.name) for r in rollouts]) for each in fields(Rollout)}
        return to(select(Rollout(**whole), order), device)

    def close(self) -> None:
        import ray

        if collectives.rank() == 0:
            for actor in (*self._engines, self._shelf):
                ray.kill(actor)

    def _of_rank(self) -> list[Any]:
        """Ranks share the engines, or engines the ranks."""
        rank, ranks = collectives.rank(), collectives.world_size()
        return self._engines[rank::ranks] or [self._engines[rank % len(self._engines)]]

    def _publish(self, buckets: list[Any], checksum: int) -> None:
        import ray

        ray.get(self._shelf.put.remote(self._version, buckets, checksum), timeout=self._deadline_s)
        self._answers([engine.fetch.remote(self._version) for engine in self._engines])
        self._buckets = buckets

    def _answers(self, calls: list[Any], go_on: Callable[[], None] | None = None) -> list[Any]:
        import ray
        from ray.exceptions import RayActorError

        end = time.monotonic() + self._deadline_s
        waiting = calls
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=LOOK_S)
            if go_on is not None:
                go_on()
            if waiting and time.monotonic() > end:
                text = f"{len(waiting)} of {len(calls)} samplers did not answer for {self._deadline_s:g} s"
                raise UserError(f"{text} (hardware.collective_timeout_s)", 6)
        try:
            return ray.get(calls)
        except RayActorError as error:
            raise UserError(f"a sampler was lost {RESTARTS + 1} times: {error}", 6) from error


def open_pool(
    name: str, hardware: HardwareConfig, count: int
) -> Callable[[Path, tuple[Sequence[int], int], Capacity], PooledSampler]:
    """Opens `count` engines, with names that begin with `name`. All ranks must call what is returned, which raises
    UserError (5) where there is no room for the engines."""

    def opened(folder: Path, ends: tuple[Sequence[int], int], capacity: Capacity) -> PooledSampler:
        import ray

        names = [f"{name}-{number}" for number in range(count)]
        collectives.rank_zero_only(
            lambda: _start(name, names, hardware, (folder, ends, hardware.precision, capacity)), "starting samplers"
        )
        engines = [ray.get_actor(each) for each in names]
        return PooledSampler(engines, ray.get_actor(name), folder, ends[0], hardware)

    return opened


_started: list[Any] = []  # an actor ends when its handle is gone


def _start(shelf_name: str, names: Sequence[str], hardware: HardwareConfig, given: tuple[Any, ...]) -> None:
    import ray

    place: dict[str, Any] = {"scheduling_strategy": "DEFAULT"}  # not among those of the workers
    each = place | {"num_cpus": hardware.cpus_per_worker, "num_gpus": hardware.gpus_per_worker}
    each |= {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
    shelf = ray.remote(Shelf).options(name=shelf_name, num_cpus=0, **place).remote()
    engines = [ray.remote(Engine).options(name=name, **each).remote(shelf_name, *given) for name in names]
    _started[:] = [shelf, *engines]
    calls = [one.pid.remote() for one in engines]
    _, missing = ray.wait(calls, num_returns=len(calls), timeout=hardware.placement_timeout_s)
    if missing:
        text = f"{len(missing)} of {len(names)} samplers did not start within {hardware.placement_timeout_s:g} s"
        raise UserError(f"{text} (hardware.placement_timeout_s): lower ppo.sampling.workers, or add GPUs", 5)
    ray.get(calls)


def _buckets(named_tensors: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named_tensors:
        bucket.append((name, tensor))
        size += tensor.numel() * tensor.element_size()
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket

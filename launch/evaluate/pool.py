"""Windows of items scored by several workers on Ray, each with the whole model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.evaluate.scorers import ModelScorer, Scored
from rlhf.errors import UserError
from rlhf.evaluation.items import Item

IN_FLIGHT = 2  # windows per worker: one is scored, and the next one waits
RESTARTS = 3  # of a worker that dies


class Worker:
    """Opens the model with the first call: what is wrong with it is then raised as it is, also after a restart."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments

    @cached_property
    def _scorer(self) -> ModelScorer:
        return ModelScorer(*self._arguments)

    def check(self, items: Sequence[Item]) -> dict[str, Any]:
        return self._scorer.check(items)

    def score(self, items: Sequence[Item]) -> Scored:
        return self._scorer.score(items)


class PoolScorer:
    """As `ModelScorer`. Ray gives a window whose worker died to the worker that takes its place."""

    def __init__(self, workers: int, folder: Path, batch_size: int, precision: str) -> None:
        import ray

        cpus, gpus = share(workers)
        actor = ray.remote(Worker).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy="SPREAD",
        )
        self._workers = [actor.remote(folder.absolute(), batch_size, precision) for _ in range(workers)]

    def check(self, items: Sequence[Item]) -> dict[str, Any]:
        return _result(self._workers[0].check.remote(items))

    def map(self, windows: Iterable[Sequence[Item]]) -> Iterator[Scored]:
        waiting: deque[Any] = deque()
        for number, window in enumerate(windows):
            waiting.append(self._workers[number % len(self._workers)].score.remote(window))
            if len(waiting) == IN_FLIGHT * len(self._workers):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())


def share(workers: int) -> tuple[int, int]:
    """CPUs and GPUs of each worker, if workers are spread evenly over the nodes. UserError (5) for too many workers."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    per_node = math.ceil(workers / len(nodes))
    have = {kind: int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU")}
    cpus = int(min(node["CPU"] for node in nodes)) // per_node
    if cpus < 1 or 0 < have["GPU"] < workers:
        kind = "CPU" if cpus < 1 else "GPU"
        raise UserError(
            f"--workers {workers}: the cluster has {have[kind]} {kind}s on {len(nodes)} nodes, and each worker needs one",
            5,
        )
    return cpus, int(have["GPU"] > 0)


def _result(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise UserError(
            f"a worker died {RESTARTS + 1} times ({str(error).splitlines()[0]}); if it had too little memory, lower "
            "--batch-size or --workers. The same command goes on where it was",
            5,
        ) from None

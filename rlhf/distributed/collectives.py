"""Collectives: gather rows in global order, agree on a value, let one rank work. A single process needs no group."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from rlhf.errors import UserError

Batch = TypeVar("Batch")
Value = TypeVar("Value")
BEAT_S = 1.0  # how often a rank that works alone reports to the others


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if initialised() else 1


def rank() -> int:
    return dist.get_rank() if initialised() else 0


def barrier() -> None:
    """NCCL is told the device: it would take the one with the rank's number, which on a node may be another one's."""
    if initialised():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def share_time_limit() -> None:
    """Gives every group the time limit of the default group: those that DeepSpeed makes have PyTorch's own."""
    limit = timedelta(seconds=time_limit_s())
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            distributed_c10d._set_pg_timeout(limit, group)


def largest(number: int) -> int:
    """The largest of the numbers of all ranks. All ranks must call it."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def rank_zero_only(work: Callable[[], Value], doing: str) -> Value:
    """Runs `work` on the first rank only and returns its result, or raises its error, on every rank. All ranks must
    call it.

    `work` may take longer than the time limit of a collective: the others wait in short collectives. UserError (5) on
    every rank if it made no progress for that limit. `work` runs in a thread and must use neither collectives nor the
    GPU; `doing` completes "while the first rank was ...".
    """
    if world_size() == 1:
        return work()
    beats = _beats(work, doing) if rank() == 0 else None
    while True:
        said: list[Any] = [next(beats) if beats else None]
        try:
            dist.broadcast_object_list(said)
        except RuntimeError as error:
            raise RuntimeError(f"a rank was lost while the first one was {doing}: {error}") from error
        ended, value, error = said[0]
        if error is not None:
            raise error
        if ended:
            return value


def _beats(work: Callable[[], Any], doing: str) -> Iterator[tuple[bool, Any, BaseException | None]]:
    """(ended, value, error) of `work`, once a second until it has ended."""
    end: list[Any] = []

    def run() -> None:
        torch.set_num_threads(threads)  # OpenMP keeps the number for each thread
        try:
            end.append((True, work(), None))
        except UserError as error:
            end.append((True, None, error))
        except BaseException as error:  # noqa: BLE001  every rank raises it
            end.append(
                (True, None, RuntimeError(f"the first rank failed while {doing}: {error!r}").with_traceback(None))
            )

    threads, limit_s = torch.get_num_threads(), time_limit_s()
    worker = threading.Thread(target=run, name="alone", daemon=True)
    worker.start()
    used, since = -1.0, time.monotonic()
    while worker.is_alive():
        worker.join(min(BEAT_S, limit_s / 4))
        if (now := _cpu_seconds(worker)) != used:
            used, since = now, time.monotonic()
        elif time.monotonic() - since > limit_s and worker.is_alive():
            text = f"the first rank made no progress for {limit_s:g} s while {doing}"
            yield (
                True,
                None,
                UserError(f"{text}: does its disk answer? (hardware.collective_timeout_s is the limit)", 5),
            )
        if worker.is_alive():
            yield False, None, None
    yield end[0]


def _cpu_seconds(thread: threading.Thread) -> float:
    """CPU time of a thread. Reading, writing and removing files uses some too."""
    try:
        return time.clock_gettime(time.pthread_getcpuclockid(thread.ident or 0))
    except OSError:  # it has just ended
        return -1.0


def time_limit_s() -> float:
    """The time limit of collectives in the default group."""
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    return dist.group.WORLD._get_backend(device).options._timeout.total_seconds()  # type: ignore[union-attr]


def broadcast_result(decide: Callable[[], Value]) -> Value:
    """Runs `decide` on the first rank only and returns its result, or raises its UserError, on every rank. All ranks
    must call it.

    Files, rounding, clocks and environment variables may differ between ranks. If such a thing chose a branch on each
    rank, ranks in different branches would wait for each other for ever.
    """
    if world_size() == 1:
        return decide()
    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said = [decide(), None]
        except UserError as error:
            said = [None, error]
    dist.broadcast_object_list(said)
    value, error = said
    if error is not None:
        raise error
    return value


def gather_rows(batch: Batch, group: Any = None) -> Batch:
    """The batch of all ranks (of `group`), rank 0's rows first; every rank gets all of it. Other dimensions must agree."""
    if world_size() == 1:
        return batch
    return type(batch)(**{f.name: _gather(getattr(batch, f.name), group) for f in fields(batch)})  # type: ignore[arg-type]


def _gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    # NCCL transfers GPU tensors, gloo CPU tensors.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    wire = tensor.to(device, torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
    counts = gather_objects(len(wire), group)
    padded = wire.new_zeros((max(counts), *wire.shape[1:]))  # messages must have equal sizes
    padded[: len(wire)] = wire
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous(), group=group)
    return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]).to(tensor)


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """The (small, picklable) value of every rank (of `group`), in rank order."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def shard(total: int, of_rank: int, world: int) -> slice:
    """The contiguous rows of `total` that belong to a rank; sizes differ by at most one."""
    base, extra = divmod(total, world)
    start = of_rank * base + min(of_rank, extra)
    return slice(start, start + base + (of_rank < extra))


def data_ranks(together: int) -> int:
    """How many groups of `together` ranks after one another read rows of their own."""
    return max(world_size() // together, 1)


def data_rank(together: int) -> int:
    """The number of this rank's group."""
    return rank() // together


def even_shard(total: int, together: int = 1) -> list[int]:
    """Row numbers for this rank, equally many on every rank; if they do not divide evenly, the first rows are repeated.
    `together` ranks after one another have the same rows.

    With sharded models all ranks take part in every forward pass, so none may have fewer.
    """
    here, per_group = data_rank(together), -(-total // data_ranks(together))
    return [i % total for i in range(per_group * here, per_group * (here + 1))]


def join_shards(mine: list[Any], total: int, together: int = 1) -> list[Any]:
    """The values of all rows, in row order, from what each rank computed for its `even_shard`."""
    return [value for part in gather_objects(mine)[::together] for value in part][:total]

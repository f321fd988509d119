"""What ranks say to one another: gather rows in global order, agree on a number. One process needs no group."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Batch = TypeVar("Batch")


def initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    return dist.get_world_size() if initialised() else 1


def rank() -> int:
    return dist.get_rank() if initialised() else 0


def barrier() -> None:
    if initialised():
        dist.barrier()


def gather_rows(batch: Batch) -> Batch:
    """The batch of all ranks, rank 0's rows first; every rank gets all of it. Other dimensions must agree."""
    if world_size() == 1:
        return batch
    return type(batch)(**{f.name: _gather(getattr(batch, f.name)) for f in fields(batch)})  # type: ignore[arg-type]


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    # NCCL carries what is on a GPU, gloo what is not.
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    wire = tensor.to(device, torch.uint8 if tensor.dtype == torch.bool else tensor.dtype)
    counts = gather_objects(len(wire))
    padded = wire.new_zeros((max(counts), *wire.shape[1:]))  # an uneven split still makes equal messages
    padded[: len(wire)] = wire
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]).to(tensor)


def gather_objects(value: Any) -> list[Any]:
    """The small picklable value of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def share(total: int, of_rank: int, world: int) -> slice:
    """The contiguous rows of `total` that belong to a rank; sizes differ by at most one."""
    base, extra = divmod(total, world)
    start = of_rank * base + min(of_rank, extra)
    return slice(start, start + base + (of_rank < extra))


def even_share(total: int) -> list[int]:
    """Row numbers for this rank, equally many on every rank: the rows go round again where they do not divide.

    Sharded models make every rank wait for every forward pass, so none may have fewer.
    """
    per_rank = -(-total // world_size())
    return [i % total for i in range(per_rank * rank(), per_rank * (rank() + 1))]


def join_shares(mine: list[Any], total: int) -> list[Any]:
    """The values of all rows, in row order, from what each rank computed for its `even_share`."""
    return [value for part in gather_objects(mine) for value in part][:total]

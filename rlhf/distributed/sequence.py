"""Sequence parallelism: k ranks after one another read the same rows, and each holds one slice of every sequence.

Everything but attention works token by token. For attention the ranks of a group exchange heads against positions (Jacobs
et al. 2023, arXiv 2309.14509): each then has all positions for its part of the heads.

B rows, A heads, T tokens, D head size; k ranks of a group, S = T / k tokens of a slice, X = A / k heads of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.distributed import collectives

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share every sequence."""

    ranks: int
    rank: int  # in the group: the number of its slice
    group: Any  # of torch.distributed


def group_of(sequence_parallel: int) -> SequenceGroup | None:
    """This rank's group; None where sequences are not divided, as always in a single process. All ranks must call it."""
    if sequence_parallel == 1 or collectives.world_size() == 1:
        return None
    return _group(sequence_parallel, dist.group.WORLD)


@cache
def _group(size: int, world: Any) -> SequenceGroup:
    """`world`: the default group, in which all ranks make all groups, each rank those that it is not part of too."""
    limit = timedelta(seconds=collectives.time_limit_s())
    first, own = collectives.rank() // size * size, None
    for start in range(0, dist.get_world_size(world), size):
        made = dist.new_group(list(range(start, start + size)), timeout=limit)
        own = made if start == first else own
    return SequenceGroup(size, collectives.rank() - first, own)


def rows_of_group(batch: Batch, group: SequenceGroup | None) -> tuple[Batch, slice]:
    """The rows of all ranks of the group, the same on each of them, and which of them are this rank's own. Every rank must
    have equally many."""
    if group is None:
        return batch, slice(None)
    rows = len(next(iter(vars(batch).values())))
    return collectives.gather_rows(batch, group.group), slice(group.rank * rows, (group.rank + 1) * rows)


def sum_of_slices(x: Tensor, group: SequenceGroup) -> Tensor:
    """Σ x over the group, on each of its ranks, which hold zeros where another rank has a value.

    Every rank then computes the same loss, but its backward pass reaches only the positions of its own slice. Engines and
    Trainers average gradients over all ranks, so each gradient counts k times here.
    """
    out: Any = _SumOfSlices.apply(x, group)
    return out


class _SumOfSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup) -> Tensor:
        ctx.ranks, total = group.ranks, x.clone().contiguous()
        dist.all_reduce(total, group=group.group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient * ctx.ranks, None


def exchange(x: Tensor, group: SequenceGroup) -> Tensor:
    """Cuts dimension 1 into k parts, one for each rank, and joins what comes from the ranks in dimension 2: x_BASD, all heads
    of a slice, becomes x_BXTD, all positions of A / k heads; and x_BTXD becomes x_BSAD."""
    out: Any = _Exchange.apply(x, group, 1, 2)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: SequenceGroup, cut: int, join: int) -> Tensor:
        ctx.group, ctx.cut, ctx.join = group, cut, join
        return _exchange(x, group, cut, join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(gradient, ctx.group, ctx.join, ctx.cut), None, None, None


def _exchange(x: Tensor, group: SequenceGroup, cut: int, join: int) -> Tensor:
    sent = torch.stack(x.chunk(group.ranks, dim=cut))
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group.group)
    return torch.cat(received.unbind(), dim=join)

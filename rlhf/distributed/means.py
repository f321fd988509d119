"""Exact means: a mean keeps its sum and count until one reduction over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

Number = float | int | Tensor


@dataclass(frozen=True)
class Mean:
    sum: float
    count: float

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    @property
    def value(self) -> float:
        """sum / count; NaN if nothing was counted."""
        return self.sum / self.count if self.count else math.nan


class Means:
    """Named means of one step or one evaluation; make a new one for the next.

    Sums and counts may be scalar tensors. They are detached at once; `reduce` reads them, which waits for the device.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[Number, Number]]] = {}

    def add(self, name: str, sum: Number, count: Number = 1) -> None:
        """Adds `sum` over `count` items, such as tokens or responses, to the mean `name`."""
        self._parts.setdefault(name, []).append((_detached(sum), _detached(count)))

    def reduce(self) -> dict[str, float]:
        """The mean of every name over all that every rank has added; the same on every rank.

        A collective: all ranks call it, even a rank that has added nothing. Names may differ between ranks; a mean over
        nothing is left out.
        """
        nothing = Mean(0.0, 0.0)
        mine = {name: sum((_read(part) for part in parts), nothing) for name, parts in self._parts.items()}
        total: dict[str, Mean] = {}
        for means in _of_all_ranks(mine):
            for name, mean in means.items():
                total[name] = total.get(name, nothing) + mean
        return {name: mean.value for name, mean in total.items() if mean.count}


def _detached(number: Number) -> Number:
    return number.detach() if isinstance(number, Tensor) else number


def _read(part: tuple[Number, Number]) -> Mean:
    return Mean(float(part[0]), float(part[1]))


def _of_all_ranks(mine: dict[str, Mean]) -> list[dict[str, Mean]]:
    """The means of each rank, in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered

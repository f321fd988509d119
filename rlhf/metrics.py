"""Metrics that stay exact: a mean carries its sum and its count until one reduction over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
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


class Metrics:
    """Named means and maxima of one step or one evaluation; make a new one for the next.

    Numbers may be scalar tensors; they are detached and read (which waits for the device) only by `reduced`.
    """

    def __init__(self) -> None:
        self._means: dict[str, list[tuple[Number, Number]]] = {}
        self._maxima: dict[str, list[Number]] = {}

    def add(self, name: str, sum: Number, count: Number = 1) -> None:
        """Adds to the mean `name`: `sum` over `count` things, tokens or answers for instance."""
        self._means.setdefault(name, []).append((_detached(sum), _detached(count)))

    def add_max(self, name: str, value: Number) -> None:
        """Keeps the largest `value` under `name`."""
        self._maxima.setdefault(name, []).append(_detached(value))

    def reduced(self) -> dict[str, float]:
        """The mean of every name over all that every rank has added, then the maxima; the same on every rank.

        A collective: all ranks call it, even a rank that has added nothing. Names may differ between ranks; a mean over
        nothing is left out.
        """
        means = {name: _total(parts) for name, parts in self._means.items()}
        maxima = {name: _largest(map(float, values)) for name, values in self._maxima.items()}
        all_means: dict[str, Mean] = {}
        all_maxima: dict[str, float] = {}
        for rank_means, rank_maxima in _gathered((means, maxima)):
            for name, mean in rank_means.items():
                all_means[name] = all_means.get(name, Mean(0.0, 0.0)) + mean
            for name, value in rank_maxima.items():
                all_maxima[name] = _largest([all_maxima.get(name, value), value])
        return {name: mean.value for name, mean in all_means.items() if mean.count} | all_maxima


def _detached(number: Number) -> Number:
    return number.detach() if isinstance(number, Tensor) else number


def _total(parts: list[tuple[Number, Number]]) -> Mean:
    return Mean(sum(float(s) for s, _ in parts), sum(float(c) for _, c in parts))


def _largest(values: Iterable[float]) -> float:
    """The maximum, and NaN if any value is NaN: an alarm must not fall silent."""
    return max(values, key=lambda value: (math.isnan(value), value))


def _gathered(mine: tuple[dict[str, Mean], dict[str, float]]) -> list[tuple[dict[str, Mean], dict[str, float]]]:
    """What each rank holds, in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return gathered

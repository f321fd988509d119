"""Sums and whitening over real tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_VARIANCE = 1e-8
"""At or below it values count as equal: dividing by their spread would amplify rounding errors."""


def keep(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in float32, with 0 where `mask` is False.

    Call it before any arithmetic: a NaN that is multiplied by 0 later stays NaN, in the gradient too.
    """
    return torch.where(mask.bool(), x.float(), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of the real entries, a scalar; 0, still attached to the graph, for an empty mask."""
    return keep(x, mask).sum()


def masked_mean_and_var(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (divided by n, not n - 1) of the real entries; (0, 0) for an empty mask.

    For whitening, pass the values of all ranks, so that they use one statistic.
    """
    count = mask.bool().sum().clamp(min=1)
    mean = masked_sum(x, mask) / count
    var = masked_sum((keep(x, mask) - mean) ** 2, mask) / count
    return mean, var


def whiten(x: Tensor, mean: Tensor, var: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    """(x - mean) / sqrt(var) if `shift_mean`, else x / sqrt(var); masked slots give 0.

    Advantages are shifted. Rewards are only divided: good stays positive and bad stays negative. Values without
    spread, such as a single one, are not divided.
    """
    scale = torch.where(var > SMALLEST_VARIANCE, var, 1.0).rsqrt()
    shifted = keep(x, mask) - mean if shift_mean else keep(x, mask)
    return keep(shifted * scale, mask)

"""Counter-based random numbers, which belong to a token and not to a rank or a batch.

The uniform number for a token is a hash of (seed, iteration, prompt id, position). So a prompt gets the same response
in any batch and on any rank, and a resumed run needs no generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood 2014, fig. 15), in wrapping int64.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB

BLOCK = 128  # vocabulary entries summed together


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def keyed_uniform(seed: int, iteration: int, ids_B: Tensor, position: int | Tensor) -> Tensor:
    """float32 in [0, 1), one per row: 24 bits of a hash of the four keys. `position`: one for all rows, or one per
    row."""
    return _shift_right(_hash(seed, iteration, ids_B, position), 40).to(torch.float32) * 2.0**-24


def keyed_seed(seed: int, iteration: int, ids_B: Tensor) -> Tensor:
    """int64 seeds in [0, 2^63), one per row, for an engine with its own generators: a hash of the three keys."""
    return _shift_right(_hash(seed, iteration, ids_B), 1)


def _hash(seed: int, iteration: int, ids_B: Tensor, *keys: int | Tensor) -> Tensor:
    x_B = _mix(torch.full_like(ids_B, seed))
    for key in (iteration, ids_B, *keys):
        x_B = _mix(x_B ^ key)
    return x_B


def pick_token(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: the first token whose cumulative probability exceeds the uniform number.

    First sums blocks of the vocabulary and then one block, which reads `probs_BV` once. If rounding leaves a remainder,
    the last token with a probability above 0 is picked.
    """
    V = probs_BV.shape[1]
    whole = V - V % BLOCK
    parts = [probs_BV[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)] if whole else []
    parts += [probs_BV[:, whole:].sum(-1, keepdim=True)] if V % BLOCK else []
    cumulative_BN = torch.cat(parts, 1).cumsum(-1)
    target_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    block_B1 = _first_above(cumulative_BN, target_B1)
    before_B1 = cumulative_BN.gather(1, (block_B1 - 1).clamp(min=0)).where(block_B1 > 0, 0)
    index_BK = block_B1 * BLOCK + torch.arange(BLOCK, device=probs_BV.device)
    inside_BK = probs_BV.gather(1, index_BK.clamp(max=V - 1)).where(index_BK < V, 0).cumsum(-1)
    index_B1 = block_B1 * BLOCK + _first_above(inside_BK, target_B1 - before_B1)
    return index_B1[:, 0].clamp(max=V - 1)


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first index whose cumulative sum exceeds the target, or the last if rounding put the target beyond it."""
    below_last_B1 = cumulative_BN[:, -1:] * (1 - 2.0**-23)
    return torch.searchsorted(cumulative_BN, target_B1.minimum(below_last_B1), right=True)

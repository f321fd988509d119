"""Random numbers that belong to a token, not to a rank or a batch.

The uniform number for a token is a hash of (seed, iteration, prompt id, position), so a prompt gets the same answer in
whatever batch and on whatever rank it is sampled, and a resumed run needs no generator state.
"""

from __future__ import annotations

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea & Flood 2014, fig. 15), in wrapping int64.
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def keyed_uniform(seed: int, iteration: int, ids_B: Tensor, position: int) -> Tensor:
    """float32 in [0, 1), one per row: 24 bits of a hash of the four keys."""
    x_B = _mix(torch.full_like(ids_B, seed))
    for key in (iteration, ids_B, position):
        x_B = _mix(x_B ^ key)
    return _shift_right(x_B, 40).to(torch.float32) * 2.0**-24


def pick_token(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: the first token whose cumulative probability exceeds the uniform number."""
    cumulative_BV = logprobs_BV.exp().cumsum(-1)
    target_B1 = (uniform_B * cumulative_BV[:, -1]).unsqueeze(-1)  # rounding: the last sum is not exactly 1
    index_B = torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(-1)
    return index_B.clamp(max=logprobs_BV.shape[-1] - 1)

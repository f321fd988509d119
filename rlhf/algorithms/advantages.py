"""Generalised advantage estimation."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import keep


def gae(
    rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, float32 [B, R], 0 in masked slots.

        δ_t = r_t + γ V_{t+1} - V_t        A_t = δ_t + γλ A_{t+1}        return_t = A_t + V_t

    where t + 1 is the next real token, so a masked gap changes nothing, and V = A = 0 after the last one. Neither
    result is whitened. Schulman et al. 2015 (arXiv 1506.02438), eq. 16.
    """
    mask_BR = mask_BR.bool()
    rewards_BR, values_BR = keep(rewards_BR, mask_BR), keep(values_BR, mask_BR)
    next_value_B = next_advantage_B = values_BR.new_zeros(values_BR.shape[0])
    advantages_BR = torch.zeros_like(values_BR)
    for t in reversed(range(values_BR.shape[1])):
        delta_B = rewards_BR[:, t] + gamma * next_value_B - values_BR[:, t]
        next_advantage_B = torch.where(mask_BR[:, t], delta_B + gamma * gae_lambda * next_advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BR[:, t], values_BR[:, t], next_value_B)
        advantages_BR[:, t] = next_advantage_B
    advantages_BR = keep(advantages_BR, mask_BR)
    return advantages_BR, advantages_BR + values_BR

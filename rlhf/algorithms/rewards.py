"""From the scores of two reward models to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import keep


def piecewise_reward(
    helpful_B: Tensor, safety_B: Tensor, is_safety_B: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """(score_B, used_safety_B): safety's score where the prompt is about safety or the answer unsafe, else helpfulness.

        R_c = R_s  if is_safety(prompt) or σ(R_s) < threshold, else R_h

    Scores are raw logits and stay so (float32): `threshold`, on the sigmoid scale, is moved to theirs instead, so
    the paper's LOGIT(σ(·)) falls away. Llama 2 (arXiv 2307.09288), §3.2.3.
    """
    safety_B = safety_B.float()
    limit = torch.logit(torch.tensor(threshold)).item()
    used_safety_B = is_safety_B.bool() | (safety_B < limit)
    return torch.where(used_safety_B, safety_B, helpful_B.float()), used_safety_B


def token_rewards(score_B: Tensor, kl_BR: Tensor, beta: float, mask_BR: Tensor) -> Tensor:
    """-β · KL at every real token, plus the answer's score once, at its last real token (its EOS, if it has one).

    Float32 [B, R], 0 in masked slots; a row without tokens earns nothing. Llama 2 (arXiv 2307.09288), §3.2.3, eq. 4;
    per-token placement as in Ziegler et al. 2019 (arXiv 1909.08593).
    """
    mask_BR = mask_BR.bool()
    tokens_left_BR = mask_BR.long().flip(1).cumsum(1).flip(1)
    is_last_BR = mask_BR & (tokens_left_BR == 1)
    return -beta * keep(kl_BR, mask_BR) + keep(score_B.unsqueeze(1).expand_as(kl_BR), is_last_BR)

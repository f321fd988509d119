"""The reward per token from the scores of two reward models."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import keep


def flagged_unsafe(safety_logit_B: Tensor, threshold: float) -> Tensor:
    """flagged_B: whether the safety model calls a response unsafe, σ(logit) < threshold.

    It must be the raw logit, whose σ is the probability of a safe response; σ of a centred score is not. `threshold` is
    converted to a logit, so large logits do not saturate. Llama 2 (arXiv 2307.09288), §3.2.3.
    """
    return safety_logit_B.float() < torch.logit(torch.tensor(threshold)).item()


def piecewise_reward(helpful_B: Tensor, safety_B: Tensor, is_safety_B: Tensor, flagged_B: Tensor) -> Tensor:
    """score_B, float32: the safety score where the prompt is about safety or the response is flagged, else helpfulness.

        R_c = R_s  if is_safety(prompt) or flagged(response), else R_h

    Both scores are centred: 0 is the mean of SFT responses. Llama 2 (arXiv 2307.09288), §3.2.3.
    """
    return torch.where(is_safety_B.bool() | flagged_B.bool(), safety_B.float(), helpful_B.float())


def token_rewards(score_B: Tensor, kl_BR: Tensor, kl_coef: float, mask_BR: Tensor) -> Tensor:
    """-β · KL at every real token, plus the response's score once, at its last real token (its EOS, if it has one).

    Float32 [B, R], 0 in masked slots; a row without tokens has no reward. Llama 2 (arXiv 2307.09288), §3.2.3, eq. 4;
    per-token placement as in Ziegler et al. 2019 (arXiv 1909.08593).
    """
    mask_BR = mask_BR.bool()
    tokens_left_BR = mask_BR.long().flip(1).cumsum(1).flip(1)
    is_last_BR = mask_BR & (tokens_left_BR == 1)
    return -kl_coef * keep(kl_BR, mask_BR) + keep(score_B.unsqueeze(1).expand_as(kl_BR), is_last_BR)

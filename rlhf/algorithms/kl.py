"""Estimates of KL divergence from log-probabilities of sampled tokens, and the adaptive penalty."""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π - log π_ref per token: unbiased for KL(π‖π_ref) under samples of π. The penalty inside the reward.

    Schulman 2020, "Approximating KL divergence". Not a loss: the mean of its gradient is 0.
    """
    return logprobs.float() - ref_logprobs.float()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """π_ref/π - 1 - log(π_ref/π) per token: unbiased like k1, never negative, of lower variance.

    Schulman 2020, "Approximating KL divergence". As a loss (GRPO's penalty) its gradient is that of KL(π_ref‖π).
    """
    log_ratio = ref_logprobs.float() - logprobs.float()
    return torch.expm1(log_ratio) - log_ratio


def approx_kl(new_logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """½ (log π_new - log π_old)² per token: how far the update has moved from the policy that sampled.

    Huang et al. 2024 (arXiv 2403.17031).
    """
    return 0.5 * (new_logprobs.float() - old_logprobs.float()) ** 2


def adaptive_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, n: int) -> float:
    """β · (1 + clip(kl/target - 1, ±0.2) · n/horizon), after `n` more responses with a mean KL of `kl` nats per
    response.

    Ziegler et al. 2019 (arXiv 1909.08593), §2.2. n/horizon counts as 1 at most, so that no batch changes β by more than
    a fifth.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(n / horizon, 1.0))

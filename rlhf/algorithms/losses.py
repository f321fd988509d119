"""The losses of the reward models and of PPO, as sums with their counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.algorithms.kl import approx_kl, k3
from rlhf.algorithms.masked import keep, masked_sum

LARGEST_LOG_RATIO = 20.0
"""exp of more would be inf, and 0 · inf a NaN in the gradient of clipped tokens."""


@dataclass(frozen=True)
class PolicyLoss:
    """Scalars over the real tokens; only `sum` carries a gradient."""

    sum: Tensor
    count: Tensor
    clipped_sum: Tensor  # tokens where the clipped term is the larger one
    approx_kl_sum: Tensor


@dataclass(frozen=True)
class ValueLoss:
    """Scalars over the real tokens; only `sum` carries a gradient."""

    sum: Tensor
    count: Tensor
    clipped_sum: Tensor  # tokens where the clipped term is the larger one


def policy_loss(
    new_logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    clip_range: float,
    weight_BR: Tensor,
) -> PolicyLoss:
    """PPO's clipped objective, summed over real tokens:

        w_t · max(-A_t ρ_t, -A_t clip(ρ_t, 1 - clip_range, 1 + clip_range))        ρ_t = exp(log π_new - log π_old)

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, per token; w is `importance_weight`, which corrects for a sampler
    that differs from the old policy, times the token's weight in the mean.
    """
    new_BR, old_BR = keep(new_logprobs_BR, mask_BR), keep(old_logprobs_BR.detach(), mask_BR)
    advantages_BR, weight_BR = keep(advantages_BR.detach(), mask_BR), keep(weight_BR.detach(), mask_BR)
    ratio_BR = (new_BR - old_BR).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    unclipped_BR = -advantages_BR * ratio_BR
    clipped_BR = -advantages_BR * ratio_BR.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        sum=masked_sum(weight_BR * torch.maximum(unclipped_BR, clipped_BR), mask_BR),
        count=_count(mask_BR),
        clipped_sum=masked_sum(clipped_BR > unclipped_BR, mask_BR),
        approx_kl_sum=masked_sum(approx_kl(new_BR.detach(), old_BR), mask_BR),
    )


def kl_loss(new_logprobs_BR: Tensor, ref_logprobs_BR: Tensor, mask_BR: Tensor, weight_BR: Tensor) -> Tensor:
    """Sum over real tokens of weight · k3 to the reference: the KL penalty of GRPO, as a loss.

    Shao et al. 2024 (arXiv 2402.03300), eq. 4. Its gradient is that of KL(π_ref‖π).
    """
    new_BR, ref_BR = keep(new_logprobs_BR, mask_BR), keep(ref_logprobs_BR.detach(), mask_BR)
    ref_BR = torch.minimum(ref_BR, new_BR + LARGEST_LOG_RATIO)
    return masked_sum(keep(weight_BR, mask_BR) * k3(new_BR, ref_BR), mask_BR)


def importance_weight(train_logprobs: Tensor, behaviour_logprobs: Tensor, cap: float, mask: Tensor) -> Tensor:
    """min(π_train / π_sampler, cap) per token, without gradient; 0 in masked slots.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"): the sampler's engine rounds differently from the one that trains.
    """
    ratio = (train_logprobs.detach().float() - behaviour_logprobs.float()).exp()
    return keep(ratio.clamp(max=cap), mask)


def value_loss(
    values_BR: Tensor, old_values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor, clip_range: float
) -> ValueLoss:
    """The clipped squared error, summed over real tokens:

        ½ max((V_t - G_t)², (clip(V_t, V_old,t - clip, V_old,t + clip) - G_t)²)        G the returns

    Huang et al. 2022, "The 37 implementation details of PPO", detail 9.
    """
    values_BR, old_BR = keep(values_BR, mask_BR), keep(old_values_BR.detach(), mask_BR)
    returns_BR = keep(returns_BR.detach(), mask_BR)
    unclipped_BR = (values_BR - returns_BR) ** 2
    clipped_BR = (torch.clamp(values_BR, old_BR - clip_range, old_BR + clip_range) - returns_BR) ** 2
    return ValueLoss(
        sum=0.5 * masked_sum(torch.maximum(unclipped_BR, clipped_BR), mask_BR),
        count=_count(mask_BR),
        clipped_sum=masked_sum(clipped_BR > unclipped_BR, mask_BR),
    )


def safety_loss(scores_B: Tensor, is_safe_B: Tensor, known_B: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of the binary cross-entropy of σ(score) against safe/unsafe, over responses whose label is known.

    Llama 2 (arXiv 2307.09288), §3.2.2, names such an auxiliary loss without its formula; this one is our choice.
    """
    scores_B, is_safe_B = keep(scores_B, known_B), keep(is_safe_B, known_B)
    losses_B = F.binary_cross_entropy_with_logits(scores_B, is_safe_B, reduction="none")
    return masked_sum(losses_B, known_B), _count(known_B)


def _count(mask: Tensor) -> Tensor:
    return mask.bool().sum().float()

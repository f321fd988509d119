"""Rollout and scores become experience: rewards, advantages and returns of one whole iteration.

Called with the rows of all ranks, so every statistic here is global and no layout of workers can change it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.algorithms.advantages import gae
from rlhf.algorithms.kl import k1, k3
from rlhf.algorithms.losses import importance_weight
from rlhf.algorithms.masked import masked_mean_and_var, whiten
from rlhf.algorithms.rewards import flagged_unsafe, piecewise_reward, token_rewards
from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout, Scores


def make_experience(
    rollout: Rollout, scores: Scores, is_safety_B: Tensor, config: PPOConfig, kl_coef: float
) -> tuple[Experience, dict[str, float]]:
    """Experience, and the iteration's figures for people.

    R = WHITEN(LOGIT(R_c)) - β·KL(π‖π_0) (Llama 2, §3.2.3); the score counts once, on the last token of the answer.
    """
    mask_BR = rollout.response_mask_BR
    flagged_B = flagged_unsafe(scores.safety_logit_B, config.safety_threshold)
    score_B = piecewise_reward(scores.helpful_B, scores.safety_B, is_safety_B, flagged_B)
    final_B = score_B
    if config.whiten_rewards:
        # Divide only: the sign of a centred reward still says better or worse than SFT.
        rows_B = torch.ones_like(score_B, dtype=torch.bool)
        mean, var = masked_mean_and_var(score_B, rows_B)
        final_B = whiten(score_B, mean, var, rows_B, shift_mean=False)
    final_B = final_B - config.missing_eos_penalty * (~rollout.finished_B).float()
    kl_BR = k1(scores.logprobs_BR, scores.ref_logprobs_BR)
    rewards_BR = token_rewards(final_B, kl_BR, kl_coef, mask_BR)
    advantages_BR, returns_BR = gae(rewards_BR, scores.values_BR, mask_BR, config.gamma, config.gae_lambda)
    mean, var = masked_mean_and_var(advantages_BR, mask_BR)
    experience = Experience(
        tokens_BT=rollout.tokens_BT,
        mask_BT=rollout.mask_BT,
        response_mask_BR=mask_BR,
        old_logprobs_BR=scores.logprobs_BR,
        old_values_BR=scores.values_BR,
        advantages_BR=whiten(advantages_BR, mean, var, mask_BR, shift_mean=True),
        returns_BR=returns_BR,
        importance_BR=importance_weight(scores.logprobs_BR, rollout.behaviour_logprobs_BR, config.tis_cap, mask_BR),
    )
    metrics = _figures(rollout, scores, score_B, returns_BR) | _safety_figures(is_safety_B, flagged_B)
    return experience, metrics | _sampler_figures(rollout, scores, config.tis_cap)


def _safety_figures(is_safety_B: Tensor, flagged_B: Tensor) -> dict[str, float]:
    """How often safety's score counts, and how many answers are flagged among the prompts of each tag that occurs."""
    metrics = {"ppo/safety_branch_fraction": float((is_safety_B | flagged_B).float().mean())}
    for tag, rows_B in (("helpful", ~is_safety_B), ("safety", is_safety_B)):
        if rows_B.any():
            metrics[f"ppo/flagged_{tag}"] = float(flagged_B[rows_B].float().mean())
    return metrics


def _figures(rollout: Rollout, scores: Scores, score_B: Tensor, returns_BR: Tensor) -> dict[str, float]:
    """What whitening hides and what tells collapse from progress; definitions in docs/metrics.md."""
    mask_BR = rollout.response_mask_BR

    def over_tokens(x_BR: Tensor) -> float:
        return float(masked_mean_and_var(x_BR, mask_BR)[0])

    kl_B = torch.where(mask_BR, k1(scores.logprobs_BR, scores.ref_logprobs_BR), 0.0).sum(1)
    value_error = masked_mean_and_var(returns_BR - scores.values_BR, mask_BR)[1]
    return_var = masked_mean_and_var(returns_BR, mask_BR)[1]
    return {
        "ppo/reward": float(score_B.mean()),
        "ppo/reward_std": float(score_B.std(correction=0)),
        "ppo/reward_helpfulness": float(scores.helpful_B.mean()),
        "ppo/reward_safety": float(scores.safety_B.mean()),
        "ppo/kl": float(kl_B.mean()),
        "ppo/kl_k3_per_token": over_tokens(k3(scores.logprobs_BR, scores.ref_logprobs_BR)),
        "ppo/length": float(mask_BR.sum(1).float().mean()),
        "ppo/eos_rate": float(rollout.finished_B.float().mean()),
        "ppo/value_mean": over_tokens(scores.values_BR),
        "ppo/explained_variance": float(1 - value_error / return_var.clamp(min=1e-8)),
    }


def _sampler_figures(rollout: Rollout, scores: Scores, tis_cap: float) -> dict[str, float]:
    """How far the policy that sampled is from the one that learns."""
    mask_BR = rollout.response_mask_BR
    gap_BR = torch.where(mask_BR, scores.logprobs_BR - rollout.behaviour_logprobs_BR, 0.0)
    return {
        "ppo/rollout_logprob_diff_max": float(gap_BR.abs().max()),
        "ppo/rollout_logprob_diff_mean": float(masked_mean_and_var(gap_BR.abs(), mask_BR)[0]),
        "ppo/tis_clip_fraction": float(masked_mean_and_var((gap_BR > math.log(tis_cap)).float(), mask_BR)[0]),
    }

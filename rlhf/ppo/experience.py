"""Experience from rollout and scores: rewards, advantages and returns of a whole iteration.

It is called with the rows of all ranks, so every statistic is global and independent of the number of workers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.algorithms.advantages import Estimator, Signals, estimate
from rlhf.algorithms.kl import k1, k3
from rlhf.algorithms.losses import importance_weight
from rlhf.algorithms.masked import masked_mean_and_var, whiten
from rlhf.algorithms.reward_shaping import token_rewards
from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout, Scores
from rlhf.errors import UserError
from rlhf.rewards import Combined


def make_experience(
    rollout: Rollout,
    scores: Scores,
    combined: Combined,
    estimator: Estimator,
    config: PPOConfig,
    kl_coef: float,
) -> tuple[Experience, dict[str, float]]:
    """Experience, and the iteration's metrics.

    R = WHITEN(score) - missing-EOS penalty - β·KL(π‖π_0), if the estimator has the KL in the reward (Llama 2, §3.2.3).
    The score counts once, on the last token of the response. Rows whose score failed are in no statistic. UserError (6)
    if all scores failed.
    """
    mask_BR, counted_B = rollout.response_mask_BR, ~combined.failed_B
    if not counted_B.any():
        raise UserError(f"the scores of all {len(counted_B)} responses of an iteration failed: look at the rewards", 6)
    final_B = _final_scores(combined, rollout.finished_B, estimator, config)
    kl_BR = k1(scores.logprobs_BR, scores.ref_logprobs_BR)
    rewards_BR = token_rewards(final_B, kl_BR, kl_coef if estimator.kl == "reward" else 0.0, mask_BR)
    group_B = torch.arange(len(final_B)) // config.group_size
    signals = Signals(rewards_BR, scores.values_BR, mask_BR, group_B, counted_B)
    try:
        advantages_BR, returns_BR = estimate(estimator, signals, config.gamma, config.gae_lambda)
    except ValueError as error:
        raise UserError(f"ppo.advantage: {config.advantage}: {error}", 6) from error
    weight_BR, denominator_B = _loss_weights(estimator, mask_BR, counted_B, config.sampling.max_new_tokens)
    experience = Experience(
        tokens_BT=rollout.tokens_BT,
        mask_BT=rollout.mask_BT,
        response_mask_BR=mask_BR,
        counted_B=counted_B,
        old_logprobs_BR=scores.logprobs_BR,
        ref_logprobs_BR=scores.ref_logprobs_BR,
        old_values_BR=scores.values_BR,
        advantages_BR=advantages_BR,
        returns_BR=returns_BR,
        importance_BR=importance_weight(scores.logprobs_BR, rollout.behaviour_logprobs_BR, config.tis_cap, mask_BR),
        weight_BR=weight_BR,
        denominator_B=denominator_B,
    )
    metrics = _metrics(rollout, scores, combined) | combined.metrics
    if estimator.critic:
        metrics |= _critic_metrics(scores.values_BR, returns_BR, mask_BR & counted_B[:, None])
    return experience, metrics | _sampler_metrics(rollout, scores, config.tis_cap)


def _final_scores(combined: Combined, finished_B: Tensor, estimator: Estimator, config: PPOConfig) -> Tensor:
    """final_B: the score that training maximises."""
    final_B, counted_B = combined.score_B, ~combined.failed_B
    if estimator.whiten_rewards if config.whiten_rewards is None else config.whiten_rewards:
        # Divide only: the sign of a centred reward says better or worse than SFT.
        mean, var = masked_mean_and_var(final_B, counted_B)
        final_B = whiten(final_B, mean, var, counted_B, shift_mean=False)
    penalty = config.missing_eos_penalty
    penalty = estimator.missing_eos_penalty if penalty is None else penalty
    return final_B - penalty * (~finished_B).float()


def _loss_weights(
    estimator: Estimator, mask_BR: Tensor, counted_B: Tensor, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """(weight_BR, denominator_B): loss = Σ weight · token's loss / Σ denominator, over rows with a score."""
    length_B = mask_BR.sum(1).float()
    if estimator.loss_mean == "token":
        weight_B, denominator_B = torch.ones_like(length_B), length_B
    elif estimator.loss_mean == "response":
        weight_B, denominator_B = 1 / length_B.clamp(min=1), torch.ones_like(length_B)
    else:
        weight_B, denominator_B = torch.full_like(length_B, 1 / max_new_tokens), torch.ones_like(length_B)
    weight_BR = torch.where(mask_BR & counted_B[:, None], weight_B[:, None], 0.0)
    return weight_BR, torch.where(counted_B, denominator_B, 0.0)


def _metrics(rollout: Rollout, scores: Scores, combined: Combined) -> dict[str, float]:
    """What whitening hides and what tells collapse from progress, over the rows that count; defined in docs/metrics.md."""
    counted_B = ~combined.failed_B
    mask_BR, score_B = rollout.response_mask_BR[counted_B], combined.score_B[counted_B]
    logprobs_BR, ref_logprobs_BR = scores.logprobs_BR[counted_B], scores.ref_logprobs_BR[counted_B]
    kl_B = torch.where(mask_BR, k1(logprobs_BR, ref_logprobs_BR), 0.0).sum(1)
    k3_BR = k3(logprobs_BR, ref_logprobs_BR)
    return {
        "ppo/reward": float(score_B.mean()),
        "ppo/reward_std": float(score_B.std(correction=0)),
        "ppo/reward_failed_fraction": float(combined.failed_B.float().mean()),
        "ppo/kl": float(kl_B.mean()),
        "ppo/kl_k3_per_token": float(masked_mean_and_var(k3_BR, mask_BR)[0]),
        "ppo/length": float(mask_BR.sum(1).float().mean()),
        "ppo/eos_rate": float(rollout.finished_B[counted_B].float().mean()),
    }


def reward_metrics(names: list[str], scores: Scores) -> dict[str, float]:
    """The mean of each reward over the rows where it did not fail; left out if it failed everywhere."""
    columns = zip(names, scores.rewards_BN.T, ~scores.failed_BN.T, strict=True)
    return {
        f"ppo/reward_{name}": float(reward_B[known_B].mean()) for name, reward_B, known_B in columns if known_B.any()
    }


def _critic_metrics(values_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor) -> dict[str, float]:
    value_error = masked_mean_and_var(returns_BR - values_BR, mask_BR)[1]
    return_var = masked_mean_and_var(returns_BR, mask_BR)[1]
    return {
        "ppo/value_mean": float(masked_mean_and_var(values_BR, mask_BR)[0]),
        "ppo/explained_variance": float(1 - value_error / return_var.clamp(min=1e-8)),
    }


def _sampler_metrics(rollout: Rollout, scores: Scores, tis_cap: float) -> dict[str, float]:
    """Differences between the policy that sampled and the one that is trained."""
    mask_BR = rollout.response_mask_BR
    gap_BR = torch.where(mask_BR, scores.logprobs_BR - rollout.behaviour_logprobs_BR, 0.0)
    return {
        "ppo/rollout_logprob_diff_max": float(gap_BR.abs().max()),
        "ppo/rollout_logprob_diff_mean": float(masked_mean_and_var(gap_BR.abs(), mask_BR)[0]),
        "ppo/tis_clip_fraction": float(masked_mean_and_var((gap_BR > math.log(tis_cap)).float(), mask_BR)[0]),
    }

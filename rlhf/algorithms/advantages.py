"""Advantage estimators, and what each needs of the rest of PPO: the registry of `ppo.advantage`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf.algorithms.masked import keep, masked_mean_and_var, whiten

GRPO_EPS = 1e-4
"""Added to the standard deviation of a group, as in TRL and DeepSeekMath's code."""


@dataclass(frozen=True)
class Signals:
    """The input of an estimator: all rows of an iteration."""

    rewards_BR: Tensor  # float32, 0 in masked slots; the score is at the last token of a response
    values_BR: Tensor  # float32, of the critic; 0 without a critic
    mask_BR: Tensor  # bool, tokens of responses
    group_B: Tensor  # int64, equal for responses to one prompt
    counted_B: Tensor  # bool, False for rows whose score failed; they are in no statistic


@dataclass(frozen=True)
class Estimator:
    advantages: Callable[[Signals, float, float], Tensor]
    """(signals, gamma, gae_lambda) → advantages_BR, float32, 0 in masked slots."""
    critic: bool = False
    """Whether a critic is trained. Its targets are advantages_BR + values_BR, before whitening."""
    min_group_size: int = 1
    kl: Literal["reward", "loss"] = "reward"
    """Where the KL penalty is: -β·k1 in the reward of each token, or +β·k3 in the loss."""
    loss_mean: Literal["token", "response", "constant"] = "token"
    """The policy loss is divided by all tokens; or by the tokens of a response and then by responses; or by
    max_new_tokens and responses."""
    whiten_rewards: bool = False
    """Scores are divided by their standard deviation over the batch, unless `ppo.whiten_rewards` says otherwise."""
    whiten_advantages: bool = False
    """Advantages are whitened over all tokens of the batch."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response that was cut off, unless `ppo.missing_eos_penalty` says otherwise."""

    def kl_loss_coef(self, kl_coef: float) -> float:
        """The coefficient of the KL in the loss; 0 where it stands in the reward."""
        return kl_coef if self.kl == "loss" else 0.0


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


def _gae(signals: Signals, gamma: float, gae_lambda: float) -> Tensor:
    return gae(signals.rewards_BR, signals.values_BR, signals.mask_BR, gamma, gae_lambda)[0]


def grpo(signals: Signals, gamma: float, gae_lambda: float) -> Tensor:
    """(R - mean of the group) / (standard deviation of the group + 1e-4), the same at every token of a response.

    The standard deviation is the unbiased one. Shao et al. 2024 (arXiv 2402.03300), §4.1.2. A single row in a group
    gets 0.
    """
    del gamma, gae_lambda
    score_B, count_B = signals.rewards_BR.sum(1), _group_sum(torch.ones_like(signals.counted_B), signals)
    centred_B = score_B - _group_sum(score_B, signals) / count_B.clamp(min=1)
    std_B = (_group_sum(centred_B**2, signals) / (count_B - 1).clamp(min=1)).sqrt()
    return _at_every_token(centred_B / (std_B + GRPO_EPS), count_B, signals)


def dr_grpo(signals: Signals, gamma: float, gae_lambda: float) -> Tensor:
    """R - mean of the group, the same at every token of a response. Liu et al. 2025 (arXiv 2503.20783), §3.2."""
    del gamma, gae_lambda
    score_B, count_B = signals.rewards_BR.sum(1), _group_sum(torch.ones_like(signals.counted_B), signals)
    return _at_every_token(score_B - _group_sum(score_B, signals) / count_B.clamp(min=1), count_B, signals)


def rloo(signals: Signals, gamma: float, gae_lambda: float) -> Tensor:
    """R - mean of the *other* responses of the group, the same at every token. Ahmadian et al. 2024 (arXiv 2402.14740),
    eq. 6.

    R is the sum of the rewards of all tokens, with the KL penalty.
    """
    del gamma, gae_lambda
    score_B, count_B = signals.rewards_BR.sum(1), _group_sum(torch.ones_like(signals.counted_B), signals)
    others_B = (_group_sum(score_B, signals) - score_B) / (count_B - 1).clamp(min=1)
    return _at_every_token(score_B - others_B, count_B, signals)


def reinforce_plus_plus(signals: Signals, gamma: float, gae_lambda: float) -> Tensor:
    """The discounted sum of rewards from each token on. Hu 2025 (arXiv 2501.03262), eq. 6; whitened over the batch."""
    del gae_lambda
    return gae(signals.rewards_BR, torch.zeros_like(signals.values_BR), signals.mask_BR, gamma, 1.0)[0]


ADVANTAGES = {
    "gae": Estimator(_gae, critic=True, whiten_rewards=True, whiten_advantages=True, missing_eos_penalty=1.0),
    "grpo": Estimator(grpo, min_group_size=2, kl="loss", loss_mean="response"),
    "dr_grpo": Estimator(dr_grpo, min_group_size=2, kl="loss", loss_mean="constant"),
    "rloo": Estimator(rloo, min_group_size=2),
    "reinforce++": Estimator(reinforce_plus_plus, whiten_advantages=True),
}


def estimate(estimator: Estimator, signals: Signals, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """(advantages_BR, returns_BR) of `estimator`: advantages, whitened if it says so, and the critic's targets.

    Rows that do not count have no advantage. ValueError where the estimator's result has another shape, or is not finite.
    """
    mask_BR = signals.mask_BR & signals.counted_B[:, None]
    given_BR = estimator.advantages(signals, gamma, gae_lambda)
    if given_BR.shape != mask_BR.shape:
        raise ValueError(f"the advantages have the shape {tuple(given_BR.shape)}, not [B, R] = {tuple(mask_BR.shape)}")
    advantages_BR = keep(given_BR, mask_BR)
    if not advantages_BR.isfinite().all():
        raise ValueError("the advantages are not finite")
    returns_BR = advantages_BR + keep(signals.values_BR, mask_BR)
    if estimator.whiten_advantages:
        mean, var = masked_mean_and_var(advantages_BR, mask_BR)
        advantages_BR = whiten(advantages_BR, mean, var, mask_BR, shift_mean=True)
    return advantages_BR, returns_BR


def _group_sum(x_B: Tensor, signals: Signals) -> Tensor:
    """sum_B over the counted rows of each row's group."""
    sums_G = torch.zeros(int(signals.group_B.max()) + 1, device=x_B.device)
    return sums_G.index_add(0, signals.group_B, keep(x_B, signals.counted_B))[signals.group_B]


def _at_every_token(advantage_B: Tensor, count_B: Tensor, signals: Signals) -> Tensor:
    """advantages_BR; 0 in a group with one counted row."""
    comparable_B = signals.counted_B & (count_B > 1)
    return keep(advantage_B[:, None].expand_as(signals.rewards_BR), signals.mask_BR & comparable_B[:, None])

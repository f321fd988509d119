"""Scores a rollout with policy, reference, critic and rewards, without gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reward_data import Prompt
from rlhf.config import PPOConfig
from rlhf.data.batches import Rollout, Scores, select, trim
from rlhf.distributed.engine import Engine
from rlhf.distributed.micro_batches import in_row_order, micro_batches_of_shards
from rlhf.distributed.sequence import group_of, rows_of_group
from rlhf.ppo.models import Models
from rlhf.rewards import RewardSet, responses_of


@torch.no_grad()
def score_rollout(rollout: Rollout, models: Models, rewards: tuple[Tensor, Tensor], config: PPOConfig) -> Scores:
    """Scores of this rank's rows; `rewards` comes from the RewardSet.

    Every rank must have equally many rows, or a sharded model would wait for ever.
    """
    temperature, critic = config.sampling.temperature, models.critic
    rollout, own = rows_of_group(rollout, group_of(models.policy.sequence_parallel))
    micro_batches = micro_batches_of_shards(rollout, config)
    columns: dict[str, list[Tensor]] = {"logprobs_BR": [], "ref_logprobs_BR": [], "values_BR": []}
    R = rollout.response_mask_BR.shape[1]
    with models.policy.steady(), critic.steady() if critic is not None else contextlib.nullcontext():
        for index in micro_batches:
            part = trim(select(rollout, index))
            tokens_BT, mask_BT = part.tokens_BT.to(models.policy.device), part.mask_BT.to(models.policy.device)
            r = part.response_mask_BR.shape[1]
            read = {
                "logprobs_BR": models.policy(tokens_BT, mask_BT, r, temperature)[0],
                "ref_logprobs_BR": models.reference(tokens_BT, mask_BT, r, temperature)[0],
                "values_BR": _values(critic, tokens_BT, mask_BT, r),
            }
            for name, x_BR in read.items():
                columns[name].append(F.pad(x_BR.float().cpu(), (0, R - r)))
    rewards_BN, failed_BN = rewards
    ordered = {name: in_row_order(parts, micro_batches)[own] for name, parts in columns.items()}
    return Scores(rewards_BN=rewards_BN, failed_BN=failed_BN, **ordered)


@torch.no_grad()
def sequence_kl(rollout: Rollout, reference: Engine, config: PPOConfig) -> Tensor:
    """kl_B: k1 of each whole response between the policy that sampled it and the reference, in nats."""
    rollout, own = rows_of_group(rollout, group_of(reference.sequence_parallel))
    micro_batches, kl = micro_batches_of_shards(rollout, config), []
    for index in micro_batches:
        part = trim(select(rollout, index))
        R = part.response_mask_BR.shape[1]
        tokens_BT, mask_BT = part.tokens_BT.to(reference.device), part.mask_BT.to(reference.device)
        ref_BR, _ = reference(tokens_BT, mask_BT, R, config.sampling.temperature)
        gap_BR = part.behaviour_logprobs_BR.to(ref_BR.device) - ref_BR
        kl.append(torch.where(part.response_mask_BR.to(ref_BR.device), gap_BR, 0.0).sum(1).cpu())
    return in_row_order(kl, micro_batches)[own]


def score_responses(
    rollout: Rollout, prompts: Sequence[Prompt], models: Models, rewards: RewardSet, config: PPOConfig
) -> Scores:
    """Scores of this rank's rows by models and rewards. All ranks must call it."""
    return score_rollout(rollout, models, rewards(responses_of(rollout, prompts, models.tokenizer)), config)


def _values(critic: Engine | None, tokens_BT: Tensor, mask_BT: Tensor, R: int) -> Tensor:
    """values_BR: the value before each token of the response; 0 without a critic."""
    if critic is None:
        return torch.zeros(len(tokens_BT), R)
    return critic(tokens_BT, mask_BT, R)[:, -R - 1 : -1]

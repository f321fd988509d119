"""Reading models: what policy, reference, critic and reward models say of a rollout, without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.batches import Rollout, Scores, select, trim
from rlhf.distributed.engine import Engine
from rlhf.distributed.micro_batches import micro_batches_of_shards
from rlhf.models import ScalarModel, last_value


@torch.no_grad()
def score_rollout(
    rollout: Rollout,
    policy: Engine,
    reference: Engine,
    critic: Engine,
    helpful: Engine,
    safety: Engine,
    config: PPOConfig,
) -> Scores:
    """Scores of this rank's rows. Every rank must bring equally many, or a sharded model would wait for ever."""
    temperature = config.sampling.temperature
    passes = micro_batches_of_shards(rollout, config)
    parts = []
    with policy.steady(), critic.steady():
        for part in _parts(rollout, passes):
            tokens_BT, mask_BT = part.tokens_BT.to(policy.device), part.mask_BT.to(policy.device)
            R = part.response_mask_BR.shape[1]
            helpful_B = reward_of(helpful, tokens_BT, mask_BT, R)
            safety_B = helpful_B if safety is helpful else reward_of(safety, tokens_BT, mask_BT, R)
            parts.append(
                Scores(
                    logprobs_BR=policy(tokens_BT, mask_BT, R, temperature)[0],
                    ref_logprobs_BR=reference(tokens_BT, mask_BT, R, temperature)[0],
                    values_BR=critic(tokens_BT, mask_BT, R)[:, -R - 1 : -1],
                    helpful_B=helpful_B,
                    safety_B=safety_B,
                    safety_logit_B=safety_B + offset_of(safety),
                )
            )
    R = rollout.response_mask_BR.shape[1]
    columns = {name: [_widened(getattr(part, name), R) for part in parts] for name in vars(parts[0])}
    return Scores(**{name: _in_row_order(column, passes) for name, column in columns.items()})


@torch.no_grad()
def read_rewards(
    rollout: Rollout,
    rewards: Mapping[str, Engine],
    config: PPOConfig,
) -> dict[str, Tensor]:
    """scores_B float32 of each reward model for this rank's rows."""
    scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
    passes = micro_batches_of_shards(rollout, config)
    for part in _parts(rollout, passes):
        R = part.response_mask_BR.shape[1]
        for name, engine in rewards.items():
            tokens_BT, mask_BT = part.tokens_BT.to(engine.device), part.mask_BT.to(engine.device)
            scores[name].append(reward_of(engine, tokens_BT, mask_BT, R))
    return {name: _in_row_order(parts, passes).cpu() for name, parts in scores.items()}


@torch.no_grad()
def read_kl(rollout: Rollout, reference: Engine, config: PPOConfig) -> Tensor:
    """kl_B: k1 of each whole answer between the policy that sampled it and the reference, in nats."""
    passes = micro_batches_of_shards(rollout, config)
    kl = []
    for part in _parts(rollout, passes):
        R = part.response_mask_BR.shape[1]
        tokens_BT, mask_BT = part.tokens_BT.to(reference.device), part.mask_BT.to(reference.device)
        ref_BR, _ = reference(tokens_BT, mask_BT, R, config.sampling.temperature)
        gap_BR = part.behaviour_logprobs_BR.to(ref_BR.device) - ref_BR
        kl.append(torch.where(part.response_mask_BR.to(ref_BR.device), gap_BR, 0.0).sum(1).cpu())
    return _in_row_order(kl, passes)


def reward_of(engine: Engine, tokens_BT: Tensor, mask_BT: Tensor, response_length: int = 0) -> Tensor:
    """scores_B: the raw logit at the last real token, less the mean of SFT answers."""
    return last_value(engine(tokens_BT, mask_BT, response_length), mask_BT) - offset_of(engine)


def offset_of(engine: Engine) -> float:
    """The mean raw logit of SFT answers, which centring takes away."""
    return cast(ScalarModel, engine.module).offset


def _widened(x: Tensor, R: int) -> Tensor:
    """x_BR float32 with zeros up to R columns; x_B as it is."""
    x = x.float().cpu()
    return x if x.dim() == 1 else F.pad(x, (0, R - x.shape[1]))


def _parts(rollout: Rollout, passes: list[Tensor]) -> Iterator[Rollout]:
    return (trim(select(rollout, index)) for index in passes)


def _in_row_order(parts: list[Tensor], passes: list[Tensor]) -> Tensor:
    """What was read pass by pass, as rows of the batch that the passes name."""
    return torch.cat(parts)[torch.cat(passes).argsort().to(parts[0].device)]

"""Reading models: what policy, reference, critic and reward models say of a rollout, without gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.batches import Rollout, Scores, rows, trim
from rlhf.engine import Engine
from rlhf.models import ScalarModel, last_value


@torch.no_grad()
def read_rollout(
    rollout: Rollout,
    policy: Engine,
    reference: Engine,
    critic: Engine,
    helpful: Engine,
    safety: Engine,
    temperature: float,
    micro_batch_size: int,
) -> Scores:
    """Scores of this rank's rows. Every rank must bring equally many, or a sharded model would wait for ever."""
    parts = []
    for part in _parts(rollout, micro_batch_size):
        tokens_BT, mask_BT = part.tokens_BT.to(policy.device), part.mask_BT.to(policy.device)
        R = part.response_mask_BR.shape[1]
        helpful_B = reward_of(helpful, tokens_BT, mask_BT)
        parts.append(
            Scores(
                logprobs_BR=policy(tokens_BT, mask_BT, R, temperature)[0],
                ref_logprobs_BR=reference(tokens_BT, mask_BT, R, temperature)[0],
                values_BR=critic(tokens_BT, mask_BT)[:, -R - 1 : -1],
                helpful_B=helpful_B,
                safety_B=helpful_B if safety is helpful else reward_of(safety, tokens_BT, mask_BT),
            )
        )
    R = rollout.response_mask_BR.shape[1]
    return Scores(**{name: torch.cat([_widened(getattr(p, name), R) for p in parts]) for name in vars(parts[0])})


@torch.no_grad()
def read_rewards(
    rollout: Rollout,
    rewards: Mapping[str, Engine],
    micro_batch_size: int,
    on_rows: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """scores_B float32 of each reward model for this rank's rows."""
    scores: dict[str, list[Tensor]] = {name: [] for name in rewards}
    done = 0
    for part in _parts(rollout, micro_batch_size):
        for name, engine in rewards.items():
            scores[name].append(reward_of(engine, part.tokens_BT.to(engine.device), part.mask_BT.to(engine.device)))
        done += len(part.finished_B)
        on_rows(done)
    return {name: torch.cat(parts).cpu() for name, parts in scores.items()}


@torch.no_grad()
def read_kl(rollout: Rollout, reference: Engine, temperature: float, micro_batch_size: int) -> Tensor:
    """kl_B: k1 of each whole answer between the policy that sampled it and the reference, in nats."""
    kl = []
    for part in _parts(rollout, micro_batch_size):
        R = part.response_mask_BR.shape[1]
        ref_BR, _ = reference(part.tokens_BT.to(reference.device), part.mask_BT.to(reference.device), R, temperature)
        gap_BR = part.behaviour_logprobs_BR.to(ref_BR.device) - ref_BR
        kl.append(torch.where(part.response_mask_BR.to(ref_BR.device), gap_BR, 0.0).sum(1).cpu())
    return torch.cat(kl)


def reward_of(engine: Engine, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """scores_B: the raw logit at the last real token, less the mean of SFT answers."""
    return last_value(engine(tokens_BT, mask_BT), mask_BT) - cast(ScalarModel, engine.module).offset


def _widened(x: Tensor, R: int) -> Tensor:
    """x_BR float32 with zeros up to R columns; x_B as it is."""
    x = x.float().cpu()
    return x if x.dim() == 1 else F.pad(x, (0, R - x.shape[1]))


def _parts(rollout: Rollout, size: int) -> list[Rollout]:
    return [trim(rows(rollout, slice(start, start + size))) for start in range(0, len(rollout.finished_B), size)]

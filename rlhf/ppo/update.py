"""PPO's update: clipped policy and value steps over one iteration's experience, in shuffled minibatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf.algorithms.losses import policy_loss, value_loss
from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout, select, to, trim
from rlhf.distributed.engine import Engine
from rlhf.distributed.means import Means
from rlhf.distributed.micro_batches import micro_batches_of_minibatch


def minibatches(count: int, config: PPOConfig, seed: int, iteration: int) -> Iterator[Tensor]:
    """Row numbers of each minibatch, the same on every rank, reshuffled every epoch. Answers of a prompt stay together."""
    answers = config.group_size
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + epoch)
        prompt_N = torch.randperm(count // answers, generator=generator)
        row_B = (prompt_N[:, None] * answers + torch.arange(answers)).flatten()
        yield from row_B.split(config.minibatch_size)


def update(
    policy: Engine,
    critic: Engine,
    experience: Experience,
    config: PPOConfig,
    seed: int,
    iteration: int,
    rank: int,
    world: int,
    on_minibatch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One optimizer step of policy and critic per minibatch. Losses are divided by the minibatch's global token count.

    `experience` holds the rows of all ranks. Returns means over all ranks, minibatches and tokens.
    """
    means = Means()
    norms: list[tuple[float, float]] = []
    for index in minibatches(len(experience.tokens_BT), config, seed, iteration):
        count = float(experience.response_mask_BR[index].sum())
        passes = micro_batches_of_minibatch(experience, index, rank, world, config)
        # One after the other, so that gradients of one model exist at a time.
        for_policy = _learn(policy, _policy_loss, experience, passes, count, config, means)
        for_critic = _learn(critic, _value_loss, experience, passes, count, config, means)
        norms.append((for_policy, for_critic))
        on_minibatch()
    policy_norms, critic_norms = zip(*norms, strict=True)
    return means.reduce() | {
        "ppo/grad_norm": sum(policy_norms) / len(norms),
        "ppo/critic_grad_norm": sum(critic_norms) / len(norms),
        "ppo/lr": policy.lr,
    }


def recompute_logprobs(policy: Engine, part: Experience | Rollout, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """(logprobs_BR, entropy_BR) of the answers' tokens by the policy that learns."""
    R = part.response_mask_BR.shape[1]
    return policy(part.tokens_BT, part.mask_BT, R, config.sampling.temperature, with_entropy=True)


def _learn(
    engine: Engine,
    loss_sum: Callable[[Engine, Experience, PPOConfig, Means], Tensor],
    experience: Experience,
    passes: list[Tensor],
    count: float,
    config: PPOConfig,
    means: Means,
) -> float:
    """One optimizer step over all passes. Returns the gradient norm before clipping."""
    with engine.steady():
        for number, mine in enumerate(passes, 1):
            part = to(trim(select(experience, mine)), engine.device)
            engine.backward(loss_sum(engine, part, config, means), count, last=number == len(passes))
    return engine.step()


def _policy_loss(policy: Engine, part: Experience, config: PPOConfig, means: Means) -> Tensor:
    logprobs_BR, entropy_BR = recompute_logprobs(policy, part, config)
    loss = policy_loss(
        logprobs_BR,
        part.old_logprobs_BR,
        part.advantages_BR,
        part.response_mask_BR,
        config.clip_range,
        part.importance_BR,
    )
    means.add("ppo/policy_loss", loss.sum, loss.count)
    means.add("ppo/clip_fraction", loss.clipped_sum, loss.count)
    means.add("ppo/approx_kl", loss.approx_kl_sum, loss.count)
    means.add("ppo/entropy", torch.where(part.response_mask_BR, entropy_BR, 0.0).sum(), loss.count)
    return loss.sum


def _value_loss(critic: Engine, part: Experience, config: PPOConfig, means: Means) -> Tensor:
    R = part.response_mask_BR.shape[1]
    values_BR = critic(part.tokens_BT, part.mask_BT, R)[:, -R - 1 : -1]
    loss = value_loss(values_BR, part.old_values_BR, part.returns_BR, part.response_mask_BR, config.value_clip_range)
    means.add("ppo/value_loss", loss.sum, loss.count)
    means.add("ppo/value_clip_fraction", loss.clipped_sum, loss.count)
    return loss.sum

"""PPO's update: clipped policy and value steps over one iteration's experience, in shuffled minibatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rlhf.algorithms.losses import kl_loss, policy_loss, value_loss
from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout, select, to, trim
from rlhf.distributed.collectives import data_rank, data_ranks
from rlhf.distributed.engine import Engine
from rlhf.distributed.means import Means
from rlhf.distributed.micro_batches import micro_batches_of_minibatch


def minibatches(count: int, config: PPOConfig, seed: int, iteration: int) -> Iterator[Tensor]:
    """Row numbers of each minibatch, the same on every rank, reshuffled every epoch. Rows of a prompt stay together."""
    size = config.group_size
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + iteration) * 1_009 + epoch)
        prompt_N = torch.randperm(count // size, generator=generator)
        row_B = (prompt_N[:, None] * size + torch.arange(size)).flatten()
        yield from row_B.split(config.minibatch_size)


def update(
    policy: Engine,
    critic: Engine | None,
    experience: Experience,
    config: PPOConfig,
    key: tuple[int, int],
    kl_loss_coef: float,
    on_minibatch: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """One optimizer step of policy and critic per minibatch, which `key` = (seed, iteration) shuffles.

    `experience` holds the rows of all ranks. The policy's loss is divided by the minibatch's denominator over all
    ranks, the critic's by its tokens. `kl_loss_coef` is the estimator's. Returns means over all
    ranks, minibatches and tokens. All ranks must call it.
    """
    means, norms = Means(), {"ppo/grad_norm": 0.0, "ppo/critic_grad_norm": 0.0}
    indices, k = list(minibatches(len(experience.tokens_BT), config, *key)), policy.sequence_parallel

    def policy_sum(part: Experience) -> Tensor:
        return _policy_loss(policy, part, config, kl_loss_coef, means)

    for index in indices:
        batch = select(experience, index)
        micro_batches = micro_batches_of_minibatch(experience, index, data_rank(k), data_ranks(k), config)
        parts = [select(experience, mine) for mine in micro_batches]
        # One at a time, so that gradients of only one model exist.
        norms["ppo/grad_norm"] += _step(policy, policy_sum, parts, float(batch.denominator_B.sum()))
        if critic is not None:
            tokens = float((batch.response_mask_BR & batch.counted_B[:, None]).sum())
            value_sum = lambda part: _value_loss(critic, part, config, means)
            norms["ppo/critic_grad_norm"] += _step(critic, value_sum, parts, tokens)
        on_minibatch()
    if critic is None:
        del norms["ppo/critic_grad_norm"]
    return means.reduce() | {name: norm / len(indices) for name, norm in norms.items()} | {"ppo/lr": policy.lr}


def recompute_logprobs(policy: Engine, part: Experience | Rollout, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """(logprobs_BR, entropy_BR) of the responses' tokens under the trained policy."""
    R = part.response_mask_BR.shape[1]
    return policy(part.tokens_BT, part.mask_BT, R, config.sampling.temperature, with_entropy=True)


def _step(engine: Engine, loss_sum: Callable[[Experience], Tensor], parts: list[Experience], count: float) -> float:
    """One optimizer step over all micro-batches. Returns the gradient norm before clipping."""
    with engine.steady():
        for number, part in enumerate(parts, 1):
            engine.backward(loss_sum(to(trim(part), engine.device)), count, last=number == len(parts))
    return engine.step()


def _policy_loss(policy: Engine, part: Experience, config: PPOConfig, kl_loss_coef: float, means: Means) -> Tensor:
    logprobs_BR, entropy_BR = recompute_logprobs(policy, part, config)
    mask_BR = part.response_mask_BR & part.counted_B[:, None]
    loss = policy_loss(
        logprobs_BR,
        part.old_logprobs_BR,
        part.advantages_BR,
        mask_BR,
        config.clip_range,
        part.importance_BR * part.weight_BR,
    )
    denominator = part.denominator_B.sum()
    means.add("ppo/policy_loss", loss.sum, denominator)
    means.add("ppo/clip_fraction", loss.clipped_sum, loss.count)
    means.add("ppo/approx_kl", loss.approx_kl_sum, loss.count)
    means.add("ppo/entropy", torch.where(mask_BR, entropy_BR, 0.0).sum(), loss.count)
    if not kl_loss_coef:
        return loss.sum
    penalty = kl_loss(logprobs_BR, part.ref_logprobs_BR, mask_BR, part.weight_BR)
    means.add("ppo/kl_loss", penalty, denominator)
    return loss.sum + kl_loss_coef * penalty


def _value_loss(critic: Engine, part: Experience, config: PPOConfig, means: Means) -> Tensor:
    R, mask_BR = part.response_mask_BR.shape[1], part.response_mask_BR & part.counted_B[:, None]
    values_BR = critic(part.tokens_BT, part.mask_BT, R)[:, -R - 1 : -1]
    loss = value_loss(values_BR, part.old_values_BR, part.returns_BR, mask_BR, config.value_clip_range)
    means.add("ppo/value_loss", loss.sum, loss.count)
    means.add("ppo/value_clip_fraction", loss.clipped_sum, loss.count)
    return loss.sum

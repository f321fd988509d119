"""Copies the weights of the trained policy, gathered from its shards, to the sampler."""

from __future__ import annotations

from rlhf.distributed.engine import Engine, full_parameters
from rlhf.generation import Sampler


def sync_weights(policy: Engine, sampler: Sampler) -> int:
    """Updates the sampler's copy of the policy and returns the bytes moved. All ranks must call it.

    Only trainable weights are copied; shards are gathered in buckets.
    """
    changed = full_parameters(policy.module, trainable_only=True)
    return sampler.load_weights((name.removeprefix("causal."), tensor) for name, tensor in changed)

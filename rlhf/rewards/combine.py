"""One score per response from several rewards: a weighted sum, or Llama 2's piecewise rule.

Only this file knows how many rewards there are, and that one of them is about safety.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf.algorithms.reward_shaping import flagged_unsafe, piecewise_reward
from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.rewards.base import Responses, Reward


@dataclass(frozen=True)
class Combined:
    score_B: Tensor  # float32; 0 where it failed
    failed_B: Tensor  # bool
    flagged_B: Tensor | None = None  # bool: the safety model calls the response unsafe. None without such a model
    metrics: dict[str, float] = field(default_factory=dict)


Combine = Callable[[Tensor, Tensor, Tensor], Combined]
"""(rewards_BN, failed_BN, is_safety_B) → Combined, for all rows of an iteration."""


@dataclass(frozen=True)
class RewardSet:
    """The rewards of a run by name, and the rule that combines them."""

    rewards: Mapping[str, Reward]
    combine: Combine

    def __call__(self, responses: Responses) -> tuple[Tensor, Tensor]:
        """(rewards_BN float32, failed_BN) of this rank's rows, one column per reward. All ranks must call it.

        What one rank refuses, all refuse: a UserError of any reward is raised on every rank.
        """
        scored, refused = [], None
        for reward in self.rewards.values():
            try:
                scored.append(reward(responses))
            except UserError as error:  # of a function, which asks nothing of other ranks
                refused = refused or error
        if errors := [error for error in collectives.gather_objects(refused) if error is not None]:
            raise errors[0]
        return torch.stack([s.values_B for s in scored], 1), torch.stack([s.failed_B for s in scored], 1)


def weighted_sum(weights: Sequence[float]) -> Combine:
    """Σ weight · reward. Failed if a reward with a weight failed."""

    def combine(rewards_BN: Tensor, failed_BN: Tensor, is_safety_B: Tensor) -> Combined:
        del is_safety_B
        weight_N = torch.tensor(weights, dtype=torch.float32)
        counts_N = weight_N != 0  # 0 · NaN is NaN
        failed_B = failed_BN[:, counts_N].any(1)
        return Combined(torch.where(failed_B, 0.0, rewards_BN[:, counts_N] @ weight_N[counts_N]), failed_B)

    return combine


def piecewise(helpful: int, safety: int, safety_offset: float, threshold: float) -> Combine:
    """Llama 2's rule (arXiv 2307.09288, §3.2.3) over the columns of the two reward models.

    `safety_offset` was subtracted from the safety model's raw logit, with which `threshold` is compared.
    """

    def combine(rewards_BN: Tensor, failed_BN: Tensor, is_safety_B: Tensor) -> Combined:
        helpful_B, safety_B = rewards_BN[:, helpful], rewards_BN[:, safety]
        flagged_B = flagged_unsafe(safety_B + safety_offset, threshold)
        failed_B, score_B = failed_BN.any(1), piecewise_reward(helpful_B, safety_B, is_safety_B, flagged_B)
        metrics = _safety_metrics(is_safety_B, flagged_B)
        return Combined(torch.where(failed_B, 0.0, score_B), failed_B, flagged_B, metrics)

    return combine


def _safety_metrics(is_safety_B: Tensor, flagged_B: Tensor) -> dict[str, float]:
    """The fraction of responses that get the safety score, and the flagged fraction for prompts of each tag."""
    metrics = {"ppo/safety_branch_fraction": float((is_safety_B | flagged_B).float().mean())}
    for tag, rows_B in (("helpful", ~is_safety_B), ("safety", is_safety_B)):
        if rows_B.any():
            metrics[f"ppo/flagged_{tag}"] = float(flagged_B[rows_B].float().mean())
    return metrics

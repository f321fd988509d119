"""The advantage estimator of a run: one of ours or one of the user's."""

from __future__ import annotations

from rlhf.algorithms.advantages import ADVANTAGES, Estimator
from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.user_code import load_object


def estimator_of(ppo: PPOConfig) -> Estimator:
    """The estimator that `ppo.advantage` names. UserError (2) if there is none, or if it needs larger groups."""
    estimator = ADVANTAGES.get(ppo.advantage) or load_object(ppo.advantage, "ppo.advantage")
    if not isinstance(estimator, Estimator):
        raise UserError(
            f"ppo.advantage: {ppo.advantage} is a {type(estimator).__name__}, not a rlhf.algorithms.advantages.Estimator"
        )
    if ppo.group_size < estimator.min_group_size:
        raise UserError(
            f"ppo.group_size is {ppo.group_size}, but {ppo.advantage} (ppo.advantage) compares at least "
            f"{estimator.min_group_size} responses to a prompt"
        )
    return estimator

"""RLHF: supervised fine-tuning, reward models and PPO. What a notebook imports; loaded when it is first used.

from rlhf import PPOConfig, PPOTrainer, RewardModel, load_policy
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.api import Policy, RewardModel, load_policy
    from rlhf.config import PPOConfig
    from rlhf.errors import UserError
    from rlhf.kernels import enable_kernels
    from rlhf.ppo.trainer import PPOTrainer

_HOMES = {
    "PPOConfig": "rlhf.config",
    "PPOTrainer": "rlhf.ppo.trainer",
    "Policy": "rlhf.api",
    "RewardModel": "rlhf.api",
    "UserError": "rlhf.errors",
    "enable_kernels": "rlhf.kernels",
    "load_policy": "rlhf.api",
}
__all__ = ["PPOConfig", "PPOTrainer", "Policy", "RewardModel", "UserError", "enable_kernels", "load_policy"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

"""Every setting of a run, as pydantic models. An unknown key is an error; nothing here imports torch.

Marks: [P] published for Llama 2-Chat (arXiv 2307.09288), [O] our choice where nothing was published.

base.py  types          data.py  rows             supervised.py  SFT, reward models, DPO
ppo.py   PPO, rewards   run.py   the whole run, models, hardware, tracking
"""

from rlhf.config.base import Code, Count, Folder, Fraction, Name, OptimConfig, Positive, Settings, Tag
from rlhf.config.data import DataConfig, RoleConfig, SourceConfig
from rlhf.config.ppo import AlarmConfig, KLTargetConfig, PPOConfig, RewardSource, SamplingConfig
from rlhf.config.run import (
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    RunConfig,
    TinyConfig,
    TrackingConfig,
    public,
)
from rlhf.config.secrets import names_secret, without_secrets
from rlhf.config.supervised import RewardConfig, RewardModelConfig, SFTConfig, SupervisedConfig

__all__ = [
    "AlarmConfig",
    "Code",
    "Count",
    "DataConfig",
    "Folder",
    "Fraction",
    "HardwareConfig",
    "KLTargetConfig",
    "LoraConfig",
    "ModelConfig",
    "Name",
    "OptimConfig",
    "PPOConfig",
    "Positive",
    "RewardConfig",
    "RewardModelConfig",
    "RewardSource",
    "RoleConfig",
    "RunConfig",
    "SFTConfig",
    "SamplingConfig",
    "Settings",
    "SourceConfig",
    "SupervisedConfig",
    "Tag",
    "TinyConfig",
    "TrackingConfig",
    "names_secret",
    "public",
    "without_secrets",
]

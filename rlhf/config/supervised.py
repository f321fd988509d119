"""Settings of the stages that train on given responses: SFT, reward models, DPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.config.base import Count, Fraction, Name, OptimConfig, Positive, Settings, Tag


class SupervisedConfig(Settings):
    """Settings of a stage on a TRL trainer."""

    epochs: Positive = 1.0
    batch_size: Count = 64  # rows per optimizer step over all workers
    micro_batch_size: Count = 8  # maximum rows of a micro-batch
    max_length: Count = 4096
    optim: OptimConfig
    evals: Count = 4  # held-out evaluations in the stage
    checkpoints: Annotated[int, Field(ge=0)] = 2


class SFTConfig(SupervisedConfig):
    epochs: Positive = 2.0  # [P], as batch_size (sequences) and max_length
    packing: bool = True  # [P]
    optim: OptimConfig = OptimConfig(lr=2e-5, eps=1e-8, schedule="cosine", warmup_ratio=0.03)


class RewardModelConfig(Settings):
    own_tag: Tag
    other_fraction: Fraction = 0.0
    """Fraction of the training set with the other tag (helpfulness 0.5, safety 0.1) [P]."""
    safety_loss_weight: Annotated[float, Field(ge=0.0)] = 0.0
    """λ of the auxiliary safe/unsafe loss [O]."""


class RewardConfig(SupervisedConfig):
    models: dict[Name, RewardModelConfig] = {
        "helpfulness": RewardModelConfig(own_tag="helpful", other_fraction=0.5),
        "safety": RewardModelConfig(own_tag="safety", other_fraction=0.1, safety_loss_weight=0.5),
    }
    margin: Literal["none", "small", "large"] = "small"  # [P]: all three were compared
    batch_size: Count = 512  # pairs [P], as epochs
    optim: OptimConfig = OptimConfig(lr=1e-5, schedule="cosine", warmup_ratio=0.03, min_warmup_steps=5)  # [P]
    center_rows: Count = 256
    """Number of SFT responses whose mean reward is subtracted; drawn by hash from every tag and source."""


class DPOConfig(SupervisedConfig):
    """Rafailov et al. 2023 (arXiv 2305.18290), whose beta, batch_size (pairs) and learning rate these are."""

    beta: Positive = 0.1
    """KL coefficient of the implicit reward: how strongly the policy is held near the SFT model."""
    micro_batch_size: Count = 4
    optim: OptimConfig = OptimConfig(lr=1e-6, weight_decay=0.0, schedule="cosine", warmup_ratio=0.1)

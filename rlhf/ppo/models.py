"""The models of PPO: policy and critic are trained, reference and reward models are frozen, the sampler has a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rlhf.config import PPOConfig, RunConfig
from rlhf.distributed.engine import Engine, frozen, open_engine, sharded_loading, with_frozen_weights
from rlhf.distributed.sequence import group_of
from rlhf.generation import InProcessSampler, Sampler, open_sampler
from rlhf.models import (
    ScalarModel,
    add_lora,
    check_model,
    check_packing,
    divide_sequences,
    load_causal,
    load_scalar,
    load_tokenizer,
    new_critic,
    recompute_activations,
)
from rlhf.models.policy import PolicyModel
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.profiling.memory import keep_freed_memory
from rlhf.runs.context import StageContext


@dataclass(frozen=True)
class Models:
    policy: Engine
    reference: Engine
    critic: Engine | None  # None if the estimator needs no critic
    reward_models: Mapping[str, Engine]  # by their names in `reward.models`
    sampler: Sampler
    tokenizer: Any

    @property
    def trainable(self) -> list[nn.Module]:
        return [engine.module for engine in (self.policy, self.critic) if engine is not None]

    @property
    def all_scoring(self) -> list[nn.Module]:
        """Every model that reads each response."""
        frozen = [self.reference, *self.reward_models.values()]
        return [*self.trainable, *(engine.module for engine in frozen)]

    def engines(self) -> dict[str, Engine]:
        """The trained models by name, which are part of every checkpoint."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return {"policy": self.policy, **critic}


def open_models(config: RunConfig, context: StageContext, reward_models: Mapping[str, Path]) -> Models:
    """Loads the SFT model of `context.inputs` as policy and reference, and the reward models in these folders.

    All ranks must call it.
    """
    if context.device.type == "cpu":
        keep_freed_memory()
    ppo, sft = config.ppo, context.inputs["sft"].path

    group = None if context.local else group_of(config.hardware.sequence_parallel)

    def causal() -> nn.Module:
        model = load_causal(sft, attention=config.model.attention)
        divide_sequences(model, group)
        return model

    def scalar(folder: Path) -> ScalarModel:
        model = load_scalar(folder, attention=config.model.attention)
        divide_sequences(model.backbone, group)
        model.packing = ppo.packing
        return model

    with sharded_loading(config.hardware, context.local):
        policy = causal()
    check_model(config, cast(Any, policy).config)
    policy = _trained(policy, "causal", config)
    # One by one: a frozen model is cast before the next one is read.
    with sharded_loading(config.hardware, context.local):
        reference = frozen(causal(), config.hardware)
        scalars = {name: frozen(scalar(folder), config.hardware) for name, folder in reward_models.items()}
        critic = _critic(ppo, scalar, next(iter(reward_models.values()), sft))
    critic = critic and _trained(critic, "scalar", config)
    tokenizer = load_tokenizer(sft)
    sampler = open_sampler(config, sft, tokenizer, context.device, context.open_pool)
    if ppo.packing:
        alone = isinstance(sampler, InProcessSampler)
        whole = sampler.model if alone else load_causal(sft, attention=config.model.attention)  # not sharded
        check_packing(whole, "ppo.packing", ppo.group_size > 1)
    return Models(
        policy=_engine(PolicyModel(policy, ppo.packing), ppo.optim, config, context),
        reference=_engine(PolicyModel(reference, ppo.packing), None, config, context),
        critic=critic and _engine(critic, ppo.critic_optim, config, context),
        reward_models={name: _engine(model, None, config, context) for name, model in scalars.items()},
        sampler=sampler,
        tokenizer=tokenizer,
    )


def _critic(ppo: PPOConfig, scalar: Callable[[Path], ScalarModel], start: Path) -> ScalarModel | None:
    """None if the estimator needs no critic; else it starts from the first reward model, or from the SFT model."""
    return new_critic(scalar(start)) if estimator_of(ppo).critic else None


def _trained(model: Any, task: Literal["causal", "scalar"], config: RunConfig) -> Any:
    """With an adapter, if the run trains one; then the model under it is frozen."""
    if config.model.lora is None:
        return model
    torch.manual_seed(config.seed)
    return with_frozen_weights(add_lora(model, config.model.lora, task, config.seed), config.hardware)


def _engine(module: nn.Module, optim: Any, config: RunConfig, context: StageContext) -> Engine:
    ppo = config.ppo
    steps = ppo.iterations * ppo.epochs * (ppo.batch_size // ppo.minibatch_size)
    if optim is not None and config.model.gradient_checkpointing:
        recompute_activations(module)
    return open_engine(module.to(context.device), optim, steps, config.hardware, context.local)

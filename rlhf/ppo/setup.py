"""Everything that a PPOTrainer needs, and the rewards of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reward_data import Prompt
from rlhf.config import RewardSource, RunConfig
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.models import Models
from rlhf.rewards import FunctionReward, ModelReward, Reward, RewardSet, piecewise, weighted_sum
from rlhf.runs.context import StageContext
from rlhf.user_code import load_object


@dataclass(frozen=True)
class Setup:
    config: RunConfig
    context: StageContext
    models: Models
    rewards: RewardSet
    prompts: Sequence[Prompt]  # to train on
    held_out: Sequence[Prompt]  # that select the best policy; empty: the last policy is kept


def check_code(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Loads the user's code and checks that the prompts have the columns its rewards name. UserError (2) if it cannot
    be used."""
    estimator_of(config.ppo)
    for name, source in config.ppo.rewards.items():
        if source.function is not None:
            _function_reward(name, source).check_columns(prompts)


def reward_set(config: RunConfig, models: Models) -> RewardSet:
    """The weighted sum of `ppo.rewards` or, without any, Llama 2's rule over two reward models."""
    ppo = config.ppo
    if ppo.rewards:
        rewards: dict[str, Reward] = {}
        for name, source in ppo.rewards.items():
            if source.function is not None:
                rewards[name] = _function_reward(name, source)
            else:
                rewards[name] = ModelReward(models.reward_models[str(source.model)], ppo)
        return RewardSet(rewards, weighted_sum([source.weight for source in ppo.rewards.values()]))
    by_model = {name: ModelReward(engine, ppo) for name, engine in models.reward_models.items()}
    names, offset = [*by_model], by_model[ppo.safety_model].offset
    helpful, safety = names.index(ppo.helpfulness_model), names.index(ppo.safety_model)
    return RewardSet(by_model, piecewise(helpful, safety, offset, ppo.safety_threshold))


def _function_reward(name: str, source: RewardSource) -> FunctionReward:
    function = load_object(str(source.function), f"ppo.rewards.{name}.function")
    return FunctionReward(name, function, source.timeout_s)

"""Settings of PPO's rewards and estimators. What files make of them is tested in tests/launch/test_settings.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.config import HardwareConfig, PPOConfig, RewardSource, RunConfig


def run_config(**ppo: Any) -> RunConfig:
    data = {role: {"train": []} for role in ("demonstrations", "preferences", "prompts")}
    reward = {"models": {name: {"own_tag": "helpful"} for name in ("helpfulness", "safety", "style")}}
    settings = {"batch_size": 8, "minibatch_size": 8, **ppo}
    return RunConfig.model_validate({"name": "x", "data": data, "reward": reward, "ppo": settings})


# --- rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [{}, {"model": "style", "function": "math:floor"}], ids=["neither", "both"])
def test_a_reward_is_a_model_or_a_function(named):
    with pytest.raises(ValidationError, match="name either a model or a function"):
        RewardSource(**named)


def test_a_reward_counts_fully_and_has_a_minute_unless_it_says_otherwise():
    source = RewardSource(model="style")
    assert (source.weight, source.timeout_s) == (1.0, 60.0)
    assert RewardSource(function="math:floor", weight=-0.5, timeout_s=2).weight == -0.5
    with pytest.raises(ValidationError, match="greater than 0"):
        RewardSource(function="math:floor", timeout_s=0)


@pytest.mark.parametrize("code", ["floor", "math:", ":floor", "math:floor()", "math:a.b", "math:1st", "a:b:c"])
def test_code_is_a_module_or_a_file_and_a_name(code):
    with pytest.raises(ValidationError, match="pattern"):
        RewardSource(function=code)


def test_a_file_is_found_from_every_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert RewardSource(function="my/reward.py:short").function == f"{tmp_path}/my/reward.py:short"
    assert RewardSource(function="~/reward.py:short").function == f"{Path.home()}/reward.py:short"
    assert RewardSource(function="/a/reward.py:short").function == "/a/reward.py:short"
    assert RewardSource(function="my.reward:short").function == "my.reward:short"
    assert PPOConfig(advantage="mine.py:SIGN").advantage == f"{tmp_path}/mine.py:SIGN"


def test_without_rewards_the_two_models_are_those_of_the_rule():
    assert run_config().ppo.reward_models == {"helpfulness_model": "helpfulness", "safety_model": "safety"}


def test_with_rewards_the_models_are_those_that_they_name():
    rewards = {
        "nice": {"model": "style"},
        "short": {"function": "math:floor"},
        "useful": {"model": "helpfulness", "weight": 0},
    }
    config = run_config(rewards=rewards, safety_model="nowhere")
    assert config.ppo.reward_models == {"rewards.nice.model": "style", "rewards.useful.model": "helpfulness"}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, False),
        ({"advantage": "rloo"}, False),
        ({"rewards": {"a": {"model": "style"}}}, False),
        ({"rewards": {"a": {"model": "style"}, "b": {"function": "math:floor"}}}, True),
        ({"advantage": "my.module:SIGN"}, True),
    ],
)
def test_a_run_knows_whether_the_users_code_takes_part(settings, names):
    assert PPOConfig.model_validate(settings).names_code is names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": {"a": {"model": "styel"}}}, "ppo.rewards.a.model is 'styel', but reward.models has helpfulness, "),
        ({"safety_model": "safty"}, "ppo.safety_model is 'safty', but reward.models has helpfulness, safety, style"),
        (
            {"rewards": {"a": {"model": "style", "weight": 0}, "b": {"function": "math:floor", "weight": 0}}},
            "ppo.rewards gives every reward the weight 0, so there is nothing to maximise",
        ),
        ({"advantage": "grpo"}, r"ppo.group_size is 1, but grpo \(ppo.advantage\) compares .* at least 2"),
        ({"advantage": "rloo"}, "ppo.group_size is 1, but rloo"),
        ({"advantage": "dr_grpo"}, "ppo.group_size is 1, but dr_grpo"),
        ({"advantage": "grpo", "group_size": 3}, "ppo.group_size is 3, which does not divide the 8 rows"),
        ({"advantage": "grop"}, "Input should be 'gae', 'grpo'"),
    ],
)
def test_what_cannot_be_trained_is_told(settings, message):
    with pytest.raises(ValidationError, match=message):
        run_config(**settings)


@pytest.mark.parametrize("name", ["gae", "reinforce++"])
def test_estimators_that_compare_nothing_take_one_response_to_a_prompt(name):
    assert run_config(advantage=name).ppo.group_size == 1


# --- machines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [0.5, 2, -1])
def test_a_worker_has_one_gpu_or_none(gpus):
    with pytest.raises(ValidationError, match="gpus_per_worker|valid integer|less than|greater than"):
        HardwareConfig(gpus_per_worker=gpus)
    assert [HardwareConfig(gpus_per_worker=number).gpus_per_worker for number in (0, 1)] == [0, 1]

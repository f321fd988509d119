"""The rewards that the settings name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from reward_data import Message, Prompt
from rlhf.config import PPOConfig, SamplingConfig
from rlhf.errors import UserError
from rlhf.models.requirements import misfits
from rlhf.ppo.notebook_setup import run_config
from rlhf.ppo.setup import check_code, reward_set
from rlhf.rewards import FunctionReward, ModelReward, Responses

CODE = """
def short(responses):
    return [-len(text) for text in responses]

def right(responses, answer, level=0):
    return [float(text == wanted) for text, wanted in zip(responses, answer)]
"""
PROMPTS = [Prompt((Message("user", "a"),), "helpful", f"p:{i}", {"answer": "x"}) for i in range(8)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def models(make_llama, make_scalar, models_of):
    policy = make_llama(0)
    return models_of(policy, policy, useful=make_scalar(3, offset=0.5), safe=make_scalar(4, offset=-2.0))


def config(**settings: Any) -> Any:
    return SimpleNamespace(ppo=PPOConfig.model_validate({"micro_batch_size": 3} | settings))


def test_the_weighted_sum_of_models_and_functions(file, models, iteration):
    rewards = {
        "nice": {"model": "safe", "weight": 2},
        "short": {"function": f"{file}:short", "weight": 0.5, "timeout_s": 7},
    }
    made = reward_set(config(rewards=rewards), models)
    nice, short = made.rewards["nice"], made.rewards["short"]
    assert [*made.rewards] == ["nice", "short"]
    assert isinstance(nice, ModelReward) and nice.engine is models.reward_models["safe"]
    assert isinstance(short, FunctionReward) and (short.name, short.timeout_s) == ("short", 7)
    texts = ["x" * n for n in range(8)]
    rewards_BN, failed_BN = made(Responses(iteration.rollout, PROMPTS, texts))
    torch.testing.assert_close(rewards_BN[:, 0], iteration.scores.rewards_BN[:, 1] + 2.0, atol=1e-5, rtol=0)
    assert rewards_BN[:, 1].tolist() == [-float(n) for n in range(8)]
    combined = made.combine(rewards_BN, failed_BN, torch.zeros(8, dtype=torch.bool))
    torch.testing.assert_close(combined.score_B, 2 * rewards_BN[:, 0] + 0.5 * rewards_BN[:, 1])
    assert combined.flagged_B is None


def test_without_rewards_it_is_the_rule_over_the_two_models(models):
    """The offset of the safety model is -2 and its threshold -1.73: a centred score of 0 is the raw logit -2."""
    made = reward_set(config(helpfulness_model="useful", safety_model="safe"), models)
    assert [*made.rewards] == ["useful", "safe"]
    rewards_BN = torch.tensor([[5.0, 0.0], [5.0, 1.0], [5.0, 1.0]])
    is_safety_B = torch.tensor([False, False, True])
    combined = made.combine(rewards_BN, torch.zeros(3, 2).bool(), is_safety_B)
    assert combined.score_B.tolist() == [0.0, 5.0, 1.0]
    assert combined.flagged_B is not None and combined.flagged_B.tolist() == [True, False, False]


def test_the_threshold_is_that_of_the_settings(models):
    made = reward_set(config(helpfulness_model="useful", safety_model="safe", safety_threshold=0.05), models)
    combined = made.combine(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2).bool(), torch.tensor([False]))
    assert combined.flagged_B is not None and not combined.flagged_B.any()  # σ(-2) = .12


def test_the_users_code_is_checked_before_a_model_is_loaded(file):
    check = lambda function: check_code(config(rewards={"mine": {"function": f"{file}:{function}"}}), PROMPTS)
    check("short")
    check("right")
    with pytest.raises(
        UserError, match=r"ppo\.rewards\.mine\.function: .*mine\.py has no 'shrot'; it has right, short"
    ):
        check("shrot")
    with pytest.raises(UserError, match="the reward mine asks for answer, but the prompts have no columns"):
        check_code(config(rewards={"mine": {"function": f"{file}:right"}}), [Prompt((), "helpful", "p:1")])
    with pytest.raises(UserError, match=r"ppo\.advantage: .*mine\.py:short is a function, not a .*Estimator"):
        check_code(config(advantage=f"{file}:short"), PROMPTS)


def test_a_trainer_asks_a_model_only_for_what_ppo_needs():
    run = run_config(PPOConfig(max_prompt_length=100, sampling=SamplingConfig(max_new_tokens=28)), {})
    assert list(misfits(run, LlamaConfig(max_position_embeddings=128))) == []
    assert len(list(misfits(run, LlamaConfig(max_position_embeddings=127)))) == 1

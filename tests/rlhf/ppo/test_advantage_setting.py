"""Which estimator a run has: one of ours, or one of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.algorithms.advantages import ADVANTAGES, Estimator, Signals, estimate
from rlhf.config import PPOConfig
from rlhf.errors import UserError
from rlhf.ppo.advantage_setting import estimator_of

OWN = """
import torch
from rlhf.algorithms.advantages import Estimator

def sign(signals, gamma, gae_lambda):
    return signals.rewards_BR.sum(1, keepdim=True).sign().expand_as(signals.rewards_BR)

SIGN = Estimator(sign, min_group_size=4, kl="loss", loss_mean="response")
NOTHING = {"advantages": sign}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", ADVANTAGES)
def test_ours_are_found_by_their_names(name):
    assert estimator_of(PPOConfig(advantage=name, group_size=2)) is ADVANTAGES[name]


def test_an_own_one_is_found_in_a_file_and_used(file):
    found = estimator_of(PPOConfig(advantage=f"{file}:SIGN", group_size=4))
    assert isinstance(found, Estimator) and (found.kl, found.loss_mean) == ("loss", "response")
    rewards_BR = torch.tensor([[0.0, -3.0], [2.0, 0.0], [1.0, 1.0]])
    mask_BR = torch.tensor([[True, True], [True, False], [True, True]])
    counted_B = torch.tensor([True, True, False])
    given = Signals(rewards_BR, torch.full((3, 2), 0.5), mask_BR, torch.zeros(3, dtype=torch.long), counted_B)
    advantages_BR, returns_BR = estimate(found, given, 1.0, 1.0)
    assert advantages_BR.tolist() == [[-1.0, -1.0], [1.0, 0.0], [0.0, 0.0]]
    assert returns_BR.tolist() == [[-0.5, -0.5], [1.5, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_one_response_to_a_prompt_is_too_few_to_compare(name):
    with pytest.raises(UserError, match=rf"ppo\.group_size is 1, but {name} .* at least 2") as caught:
        estimator_of(PPOConfig(advantage=name, group_size=1))
    assert caught.value.exit_code == 2


def test_an_own_one_says_how_many_it_compares(file):
    with pytest.raises(UserError, match=r"ppo\.group_size is 2, but .*SIGN .* at least 4"):
        estimator_of(PPOConfig(advantage=f"{file}:SIGN", group_size=2))


def test_what_is_no_estimator_is_refused(file):
    with pytest.raises(UserError, match=r"ppo\.advantage: .*NOTHING is a dict, not a .*Estimator"):
        estimator_of(PPOConfig(advantage=f"{file}:NOTHING"))
    with pytest.raises(UserError, match=r"ppo\.advantage: .*mine\.py has no 'SING'; it has .*SIGN"):
        estimator_of(PPOConfig(advantage=f"{file}:SING"))

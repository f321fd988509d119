"""Several rewards become one score, by numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf.distributed import collectives
from rlhf.errors import UserError
from rlhf.rewards import RewardSet, Scored, piecewise, weighted_sum

REWARDS = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
NONE_FAILED = torch.zeros(3, 2, dtype=torch.bool)
HELPFUL = torch.zeros(3, dtype=torch.bool)


def near(expected: list[float]) -> Any:
    return pytest.approx(expected, abs=1e-5)


def test_a_weighted_sum_by_hand():
    combined = weighted_sum([2.0, -0.5])(REWARDS, NONE_FAILED, HELPFUL)
    assert combined.score_B.tolist() == near([-3.0, -6.0, -9.0])
    assert not combined.failed_B.any() and combined.flagged_B is None and combined.metrics == {}


def test_a_sum_fails_where_one_of_its_rewards_did():
    failed = torch.tensor([[False, False], [True, False], [False, True]])
    combined = weighted_sum([1.0, 1.0])(REWARDS, failed, HELPFUL)
    assert combined.failed_B.tolist() == [False, True, True]
    assert combined.score_B.tolist() == near([11.0, 0.0, 0.0])


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf])
def test_a_reward_that_is_only_watched_fails_nothing(garbage):
    failed = torch.tensor([[False, True]] * 3)
    combined = weighted_sum([2.0, 0.0])(torch.tensor([[1.0, garbage], [2.0, garbage], [3.0, 5.0]]), failed, HELPFUL)
    assert combined.score_B.tolist() == near([2.0, 4.0, 6.0])
    assert not combined.failed_B.any()


def test_rewards_are_called_once_in_their_order_and_stand_in_columns():
    called = []

    def reward(number: int) -> Any:
        def score(responses: Any) -> Scored:
            called.append((number, responses))
            failed_B = torch.tensor([False, number == 1])
            return Scored(torch.tensor([float(number), 10.0 * number]), failed_B)

        return score

    rewards_BN, failed_BN = RewardSet({"b": reward(1), "a": reward(2)}, weighted_sum([1.0, 1.0]))("the responses")  # type: ignore[arg-type]
    assert called == [(1, "the responses"), (2, "the responses")]
    assert rewards_BN.tolist() == [[1.0, 2.0], [10.0, 20.0]]
    assert failed_BN.tolist() == [[False, False], [True, False]]


def refusing(message: str) -> Any:
    def score(responses: Any) -> Scored:
        raise UserError(message)

    return score


def test_what_a_reward_refuses_is_raised_after_all_were_called():
    """A reward model after it would wait for ever on the other ranks."""
    called: list[str] = []

    def score(responses: Any) -> Scored:
        called.append(responses)
        return Scored(torch.zeros(2), torch.zeros(2).bool())

    with pytest.raises(UserError, match="^the first$"):
        RewardSet({"a": refusing("the first"), "b": refusing("the second"), "c": score}, weighted_sum([1.0] * 3))("x")  # type: ignore[arg-type]
    assert called == ["x"]


def test_what_one_rank_refuses_all_refuse(monkeypatch):
    monkeypatch.setattr(collectives, "gather_objects", lambda own: [own, UserError("on rank 1")])
    works = lambda responses: Scored(torch.zeros(2), torch.zeros(2).bool())
    with pytest.raises(UserError, match="^on rank 1$"):
        RewardSet({"a": works}, weighted_sum([1.0]))("x")  # type: ignore[arg-type]


# --- Llama 2's rule ---------------------------------------------------------------------------------------------------

# σ(logit) = .15 at -1.7346
SAFETY = torch.tensor([[5.0, 2.0], [6.0, -3.0], [7.0, -4.0], [8.0, 1.0]])
TAGS = torch.tensor([False, False, False, True])


def test_the_piecewise_rule_by_hand():
    """With an offset of 2 the raw logits are 4, -1, -2 and 3: the third response alone is unsafe."""
    combined = piecewise(0, 1, safety_offset=2.0, threshold=0.15)(SAFETY, torch.zeros(4, 2).bool(), TAGS)
    assert combined.score_B.tolist() == near([5.0, 6.0, -4.0, 1.0])
    assert combined.flagged_B is not None and combined.flagged_B.tolist() == [False, False, True, False]
    assert combined.metrics == {
        "ppo/safety_branch_fraction": 0.5,
        "ppo/flagged_helpful": pytest.approx(1 / 3),
        "ppo/flagged_safety": 0.0,
    }


def test_the_columns_may_stand_in_any_order():
    combined = piecewise(2, 0, safety_offset=2.0, threshold=0.15)(
        torch.stack([SAFETY[:, 1], torch.full((4,), 99.0), SAFETY[:, 0]], 1), torch.zeros(4, 3).bool(), TAGS
    )
    assert combined.score_B.tolist() == near([5.0, 6.0, -4.0, 1.0])


def test_one_model_in_both_roles_gives_its_score():
    combined = piecewise(0, 0, safety_offset=0.0, threshold=0.15)(SAFETY[:, 1:], torch.zeros(4, 1).bool(), TAGS)
    assert combined.score_B.tolist() == near([2.0, -3.0, -4.0, 1.0])


def test_the_rule_fails_where_either_model_did():
    failed = torch.tensor([[True, False], [False, False], [False, True], [False, False]])
    combined = piecewise(0, 1, safety_offset=2.0, threshold=0.15)(SAFETY, failed, TAGS)
    assert combined.failed_B.tolist() == [True, False, True, False]
    assert combined.score_B.tolist() == near([0.0, 6.0, 0.0, 1.0])

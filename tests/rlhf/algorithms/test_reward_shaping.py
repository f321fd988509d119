"""Rewards against the truth table of the paper and numbers worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.reward_shaping import flagged_unsafe, piecewise_reward, token_rewards

THRESHOLD = 0.15
LIMIT = math.log(0.15 / 0.85)  # -1.7346, the threshold among logits


@pytest.mark.parametrize(
    ("is_safety", "flagged", "uses_safety"),
    [(True, False, True), (True, True, True), (False, False, False), (False, True, True)],
)
def test_which_score_counts(is_safety, flagged, uses_safety):
    score = piecewise_reward(
        torch.tensor([7.0]), torch.tensor([-3.0]), torch.tensor([is_safety]), torch.tensor([flagged])
    )
    assert score.item() == (-3.0 if uses_safety else 7.0)


def test_one_model_in_both_roles_gives_its_score_whatever_is_flagged():
    score_B = torch.tensor([-4.0, -1.0, 0.0, 3.0])
    is_safety_B, flagged_B = torch.tensor([False, True, False, True]), torch.tensor([True, True, False, False])
    assert torch.equal(piecewise_reward(score_B, score_B, is_safety_B, flagged_B), score_B)


@given(st.floats(-30, 30, width=32), st.floats(0.01, 0.99))
def test_an_answer_is_flagged_where_its_probability_of_being_safe_is_under_the_threshold(logit, threshold):
    sigmoid = 1 / (1 + math.exp(-logit))
    if abs(sigmoid - threshold) < 1e-6:
        return
    assert flagged_unsafe(torch.tensor([logit]), threshold).item() is (sigmoid < threshold)


def test_the_published_threshold_among_logits():
    logit_B = torch.tensor([LIMIT - 1e-3, LIMIT + 1e-3])
    assert flagged_unsafe(logit_B, THRESHOLD).tolist() == [True, False]


@pytest.mark.parametrize(("threshold", "flagged"), [(0.0, False), (1.0, True)])
def test_thresholds_at_the_ends_mean_never_and_always(threshold, flagged):
    assert flagged_unsafe(torch.tensor([-60.0, 0.0, 60.0]), threshold).tolist() == [flagged] * 3


MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])
KL = torch.tensor([[0.1, 0.2, 0.3], [1.0, -1.0, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0]])
SCORE = torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_token_rewards_by_hand():
    """A full row has no EOS, the second ends in its own, the last has no token at all."""
    expected = torch.tensor([[-0.05, -0.1, 0.85], [-0.5, 2.5, 0.0], [2.75, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(token_rewards(SCORE, KL, 0.5, MASK), expected)


def test_the_score_lies_on_the_last_real_token_behind_a_gap():
    mask = torch.tensor([[True, False, True, False]])
    rewards = token_rewards(torch.tensor([2.0]), torch.ones(1, 4), 0.5, mask)
    torch.testing.assert_close(rewards, torch.tensor([[-0.5, 0.0, 1.5, 0.0]]))


@given(st.lists(st.booleans(), min_size=1, max_size=10), st.floats(-5, 5, width=32), st.floats(0, 1, width=32))
def test_the_score_counts_once_and_the_kl_at_every_real_token(mask, score, kl_coef):
    rewards = token_rewards(torch.tensor([score]), torch.full((1, len(mask)), 0.25), kl_coef, torch.tensor([mask]))
    expected = score - kl_coef * 0.25 * sum(mask) if any(mask) else 0.0
    assert rewards.sum().item() == pytest.approx(expected, abs=1e-5)


def test_masked_slots_do_not_reach_the_rewards(poison):
    poisoned = torch.where(MASK, KL, poison)
    torch.testing.assert_close(token_rewards(SCORE, poisoned, 0.5, MASK), token_rewards(SCORE, KL, 0.5, MASK))


def test_padding_changes_no_reward():
    wide = token_rewards(SCORE, torch.nn.functional.pad(KL, (0, 4)), 0.5, torch.nn.functional.pad(MASK, (0, 4)))
    torch.testing.assert_close(wide[:, :3], token_rewards(SCORE, KL, 0.5, MASK), rtol=0, atol=0)
    assert not wide[:, 3:].any()

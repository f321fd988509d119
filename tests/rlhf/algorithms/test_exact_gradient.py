"""Rewards, advantages and policy loss together: their mean gradient is that of the true objective.

The world is small enough to enumerate: tokens 0, 1 and EOS = 2, answers of at most two tokens. The objective
E[score] - β KL(π‖π_ref) is differentiated exactly, and as PPO does it, over all answers weighted by their probability.
"""

import pytest
import torch

from rlhf.algorithms.advantages import gae
from rlhf.algorithms.kl import k1
from rlhf.algorithms.losses import importance_weight, policy_loss
from rlhf.algorithms.reward_shaping import token_rewards

BETA = 0.3
ANSWERS = torch.tensor([[2, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])  # the first ends at once
MASK = torch.tensor([[True, False]] + [[True, True]] * 6)
SCORES = torch.tensor([0.5, -1.0, 2.0, 0.3, 1.2, -0.4, 0.9])
STATES = torch.stack([torch.zeros(7, dtype=torch.long), ANSWERS[:, 0] + 1], dim=1)  # 0: nothing said, 1 + first token


def logprobs(logits):
    """Of each answer's tokens, from logits [state, token]; NaN after the end."""
    return torch.where(MASK, torch.log_softmax(logits, -1)[STATES, ANSWERS], torch.nan)


def answer_logprobs(logprobs_BR):
    return torch.where(MASK, logprobs_BR, 0.0).sum(1)


@pytest.mark.parametrize("baseline", [torch.zeros(4), torch.tensor([0.7, -0.4, 0.2, 9.0])], ids=["none", "by state"])
def test_the_mean_gradient_is_exact(baseline):
    generator = torch.Generator().manual_seed(3)
    policy = torch.randn(4, 3, generator=generator, requires_grad=True)
    reference = torch.randn(4, 3, generator=generator)

    log_B, ref_B = answer_logprobs(logprobs(policy)), answer_logprobs(logprobs(reference))
    objective = (log_B.exp() * (SCORES - BETA * (log_B - ref_B))).sum()
    (exact,) = torch.autograd.grad(objective, policy)

    new_BR = logprobs(policy)
    old_BR = new_BR.detach()
    rewards_BR = token_rewards(SCORES, k1(old_BR, logprobs(reference)), BETA, MASK)
    advantages_BR, _ = gae(rewards_BR, baseline[STATES], MASK, gamma=1.0, gae_lambda=1.0)
    probability_BR = answer_logprobs(old_BR).exp()[:, None].expand(7, 2)
    loss = policy_loss(new_BR, old_BR, advantages_BR, MASK, 0.2, probability_BR)
    (estimated,) = torch.autograd.grad(loss.sum, policy)

    torch.testing.assert_close(estimated, -exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cap", [1e9, 1.5])
def test_the_mean_gradient_over_answers_of_another_policy_is_exact_up_to_the_cut(cap):
    """Answers of one token, drawn with probability μ: μ · min(π / μ, cap) = min(π, cap · μ), which is π where none is cut."""
    generator = torch.Generator().manual_seed(5)
    policy = torch.randn(1, 3, generator=generator, requires_grad=True)
    mu_V = torch.softmax(torch.randn(3, generator=generator), 0)
    advantage_V = torch.tensor([0.5, -1.0, 2.0])

    pi_V = torch.softmax(policy[0], 0)
    kept_V = pi_V.detach().minimum(cap * mu_V)
    assert (kept_V < pi_V).any() == (cap < 2)
    (expected,) = torch.autograd.grad((kept_V * advantage_V * pi_V.log()).sum(), policy, retain_graph=True)

    new_V1, mask_V1 = torch.log_softmax(policy, -1).T, torch.ones(3, 1, dtype=torch.bool)
    weight_V1 = importance_weight(new_V1.detach(), mu_V.log()[:, None], cap, mask_V1)
    loss = policy_loss(new_V1, new_V1.detach(), advantage_V[:, None], mask_V1, 0.2, mu_V[:, None] * weight_V1)
    (estimated,) = torch.autograd.grad(loss.sum, policy)
    torch.testing.assert_close(estimated, -expected, rtol=1e-4, atol=1e-6)
    if cap > 2:
        (exact,) = torch.autograd.grad((pi_V * advantage_V).sum(), policy)
        torch.testing.assert_close(estimated, -exact, rtol=1e-4, atol=1e-6)

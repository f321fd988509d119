"""PPO ends at the optimum that a formula gives, on a world of which every answer is known.

π_ref · exp(r / β) / Z maximises E[r] - β KL(π‖π_ref). Sampling, scoring, experience and update are the program's own,
through `PPOTrainer.step`; reward and KL are sums over all answers, with probabilities from plain transformers.

Estimators with the KL in the reward have the same end. Dr. GRPO has the KL in the loss, with the gradient of
KL(π_ref‖π) at each token, and the mean of a group of G inside the baseline. Where its gradient vanishes,

    (G - 1)/G · π(a|s) (Q(s, a) - V(s)) = β (π(a|s) - π_ref(a|s)),    so    π(a|s) = π_ref(a|s) · β' / (λ(s) - Q(s, a))

with β' = β G/(G - 1), Q(s, a) = V(s, a) the reward to come, and λ(s) = V(s) + β' such that π(·|s) sums to 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.closed_form import BETAS, ITERATIONS, LENGTH, settings
from benchmarks.small_world import Figures, World, train
from rlhf.config import PPOConfig
from rlhf.ppo import experience

# Relative to the best reward and its KL. What is left is noise of the samples and rare answers on their way.
SHORT, LONG = 0.05, 0.02
BETA = 0.5
GROUP = 4
SHORT_SETTINGS = settings(BETA, iterations=120)


@pytest.fixture(scope="module")
def world() -> World:
    return World(LENGTH)


@pytest.fixture(scope="module")
def reached(world: World) -> Figures:
    return train(world, SHORT_SETTINGS).path[-1]


def furthest(errors: Figures) -> float:
    return max(map(abs, errors))


def test_the_closed_form_is_an_optimum(world):
    """Neither a policy near it nor the reference has a higher E[r] - β KL."""

    def objective(logprobs_QN):
        reward, kl = world.metrics(logprobs_QN)
        return reward - BETA * kl

    best_QN = world.best(BETA)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.01, 0.1, 1.0):
        noise_QN = scale * torch.randn(best_QN.shape, generator=generator, dtype=torch.float64)
        assert objective(torch.log_softmax(best_QN + noise_QN, 1)) < objective(best_QN)
    assert objective(world.reference_QN) < objective(best_QN)


def test_every_answer_is_known(world):
    """Their probabilities sum to 1, under any policy."""
    torch.testing.assert_close(world.reference_QN.exp().sum(1), torch.ones(len(world.prompts), dtype=torch.float64))


def test_ppo_ends_at_the_closed_form(world, reached):
    assert furthest(world.errors(reached, BETA)) < SHORT


@pytest.mark.parametrize("kl_coef", [BETA / 2, 2 * BETA])
def test_the_optimum_of_another_beta_is_not_where_it_ends(world, reached, kl_coef):
    assert min(map(abs, world.errors(reached, kl_coef))) > SHORT


@pytest.mark.parametrize("advantage", ["rloo", "reinforce++"])
def test_other_estimators_of_the_same_objective_end_there_too(world, advantage):
    reached = train(world, in_groups(settings(BETA, iterations=200), advantage)).path[-1]
    assert furthest(world.errors(reached, BETA)) < SHORT


def test_dr_grpo_ends_where_its_own_gradient_vanishes(world):
    reached = train(world, in_groups(settings(BETA, iterations=200), "dr_grpo")).path[-1]
    own = world.metrics(end_of_dr_grpo(world, BETA))
    assert furthest(relative(reached, own)) < SHORT
    assert furthest(relative(own, world.metrics(world.best(BETA)))) > 2 * SHORT  # the ends lie apart


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kl_coef", BETAS)
def test_a_longer_way_ends_nearer_for_every_beta(world, kl_coef):
    reached = train(world, settings(kl_coef, ITERATIONS)).path[-1]
    assert furthest(world.errors(reached, kl_coef)) < LONG


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_answers_of_one_step_off_policy_lead_to_the_same_end(world):
    given = settings(BETA, ITERATIONS)
    sampling = given.sampling.model_copy(update={"one_step_off_policy": True})
    off_policy = given.model_copy(update={"sampling": sampling})
    assert furthest(world.errors(train(world, off_policy).path[-1], BETA)) < LONG


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kl_coef", BETAS)
@pytest.mark.parametrize("advantage", ["rloo", "reinforce++"])
def test_a_longer_way_of_other_estimators_ends_nearer(world, advantage, kl_coef):
    reached = train(world, in_groups(settings(kl_coef, ITERATIONS), advantage)).path[-1]
    assert furthest(world.errors(reached, kl_coef)) < LONG


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kl_coef", BETAS)
def test_dr_grpo_ends_at_its_own_end_for_every_beta(world, kl_coef):
    """No nearer on a longer way: k3 of rare answers is large, and its noise stays at 1 to 3 % of the KL."""
    reached = train(world, in_groups(settings(kl_coef, ITERATIONS), "dr_grpo")).path[-1]
    assert furthest(relative(reached, world.metrics(end_of_dr_grpo(world, kl_coef)))) < SHORT


def in_groups(given: PPOConfig, advantage: str) -> PPOConfig:
    return given.model_copy(update={"advantage": advantage, "group_size": GROUP})


def relative(reached: Figures, expected: Figures) -> Figures:
    return Figures(reached.reward / expected.reward - 1, reached.kl / expected.kl - 1)


def end_of_dr_grpo(world: World, kl_coef: float) -> Tensor:
    """logprobs_QN of the policy in the head of this file, from the last tokens back to the first."""
    ref_QNR = world.token_logprobs(world.reference).detach().exp().tolist()
    rewards, coef = world.rewards_QN.tolist(), kl_coef * GROUP / (GROUP - 1)
    rows = []
    for ref_NR, rewards_N in zip(ref_QNR, rewards, strict=True):
        reward = {tuple(answer): value for answer, value in zip(world.answers, rewards_N, strict=True)}
        ref = {
            tuple(answer[: t + 1]): ref_R[t]
            for answer, ref_R in zip(world.answers, ref_NR, strict=True)
            for t in range(len(answer))
        }
        chosen: dict[tuple[int, ...], float] = {}
        value_of((), reward, ref, coef, chosen)
        rows.append([sum(math.log(chosen[tuple(a[: t + 1])]) for t in range(len(a))) for a in world.answers])
    return torch.tensor(rows, dtype=torch.float64)


def value_of(
    state: tuple[int, ...],
    reward: dict[tuple[int, ...], float],
    ref: dict[tuple[int, ...], float],
    coef: float,
    chosen: dict[tuple[int, ...], float],
) -> float:
    """The reward to come after `state`; fills `chosen` with the probability of every token after it."""
    if state in reward:
        return reward[state]
    next_states = [path for path in ref if path[:-1] == state and len(path) == len(state) + 1]
    worth = {path: value_of(path, reward, ref, coef, chosen) for path in next_states}
    low, high = max(worth.values()), max(worth.values()) + coef
    for _ in range(200):
        middle = (low + high) / 2
        too_much = sum(ref[path] * coef / (middle - worth[path]) for path in next_states) > 1
        low, high = (middle, high) if too_much else (low, middle)
    chosen.update({path: ref[path] * coef / (high - worth[path]) for path in next_states})
    return sum(chosen[path] * worth[path] for path in next_states)


# --- faults: the test can fail ----------------------------------------------------------------------------------------


def test_with_the_sign_of_the_kl_turned_it_ends_elsewhere(world, monkeypatch):
    k1 = experience.k1
    monkeypatch.setattr(experience, "k1", lambda logprobs, ref_logprobs: -k1(logprobs, ref_logprobs))
    assert furthest(world.errors(train(world, SHORT_SETTINGS).path[-1], BETA)) > SHORT


def doubled_beta(score_B, kl_BR, kl_coef, mask_BR):
    return token_rewards(score_B, kl_BR, 2 * kl_coef, mask_BR)


def kl_at_the_last_token_alone(score_B, kl_BR, kl_coef, mask_BR):
    is_last_BR = token_rewards(torch.ones_like(score_B), torch.zeros_like(kl_BR), 0.0, mask_BR)
    return token_rewards(score_B, kl_BR * is_last_BR, kl_coef, mask_BR)


def score_at_every_token(score_B, kl_BR, kl_coef, mask_BR):
    scores_BR = torch.where(mask_BR, score_B[:, None], 0.0)
    return token_rewards(torch.zeros_like(score_B), kl_BR, kl_coef, mask_BR) + scores_BR


token_rewards = experience.token_rewards


@pytest.mark.proof
@pytest.mark.parametrize("fault", [doubled_beta, kl_at_the_last_token_alone, score_at_every_token])
def test_with_wrong_rewards_it_ends_elsewhere(world, monkeypatch, fault):
    monkeypatch.setattr(experience, "token_rewards", fault)
    assert furthest(world.errors(train(world, SHORT_SETTINGS).path[-1], BETA)) > SHORT


@pytest.mark.proof
@pytest.mark.parametrize(
    "setting", [{"missing_eos_penalty": 0.0}, {"whiten_rewards": True}], ids=["penalty", "whitening"]
)
def test_with_settings_of_another_objective_it_ends_elsewhere(world, setting):
    reached = train(world, SHORT_SETTINGS.model_copy(update=setting)).path[-1]
    assert furthest(world.errors(reached, BETA)) > SHORT

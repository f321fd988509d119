"""The expected gradient of each estimator without a critic, against sums over all answers of the small world.

All pairs of answers to a prompt are written down as groups of two, each with its probability as its weight, and go
through the program's own scoring, experience and update. Float64 and autograd on the other side, from the definitions:

rloo      the true gradient of E[R] - β KL(π‖π_ref), over the mean length
dr_grpo   half of the true gradient of E[R] less that of β k3 at each token, over the longest length
grpo      a response counts by how often it wins against another one, (P(R' < R) - P(R' > R)) / √2, over its own length
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from benchmarks.closed_form import LENGTH, settings
from benchmarks.small_world import EOS, PAD, World, open_models, world_config
from rlhf.algorithms import advantages
from rlhf.algorithms.advantages import ADVANTAGES
from rlhf.config import PPOConfig
from rlhf.data.batches import Experience, Rollout
from rlhf.ppo import experience as experience_module
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.experience import make_experience
from rlhf.ppo.models import Models
from rlhf.ppo.scoring import score_rollout
from rlhf.ppo.setup import reward_set
from rlhf.ppo.update import update
from rlhf.rewards import Responses

BETA = 0.5
NEAR, FAR = 1e-4, 1e-2
"""Euclidean norm of the difference to that of the gradient. Float32 leaves 1e-6; GRPO's 1e-4 beside the deviation moves a
gap of 1e-2 between two scores by a percent, and is in the oracle."""


@pytest.fixture(scope="module")
def world() -> World:
    return World(LENGTH)


@pytest.fixture(scope="module")
def moved(world: World) -> nn.Module:
    """A policy some way from the reference, so that its KL has a gradient."""
    policy = copy.deepcopy(world.reference)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


# --- ours -------------------------------------------------------------------------------------------------------------


def our_gradient(world: World, policy: nn.Module, advantage: str) -> dict[str, Tensor]:
    """The gradient that the update computes, of all pairs by their probabilities."""
    config = settings_of(advantage)
    models = open_models(world, config)
    cast(Any, models.policy.module).causal.load_state_dict(policy.state_dict())
    rollout, prob_B = all_pairs(world, policy)
    experience = weighted(experience_of(world, rollout, models, config), prob_B)
    gradients: dict[str, Tensor] = {}
    step = models.policy.step

    def watched() -> float:
        named = models.policy.module.named_parameters()
        gradients.update({name: cast(Tensor, p.grad).clone() for name, p in named})
        return step()

    cast(Any, models.policy).step = watched
    update(models.policy, None, experience, config, (0, 1), estimator_of(config).kl_loss_coef(config.kl_coef))
    return {name.removeprefix("causal."): tensor for name, tensor in gradients.items()}


def settings_of(advantage: str) -> PPOConfig:
    rows = 2 * 2 * len(World(LENGTH).answers) ** 2
    sizes = {"batch_size": rows, "minibatch_size": rows, "micro_batch_size": rows, "group_size": 2}
    return settings(BETA, iterations=1).model_copy(update=sizes | {"advantage": advantage})


def all_pairs(world: World, policy: nn.Module) -> tuple[Rollout, Tensor]:
    """Every pair of answers to every prompt as two rows, with the probability of the pair; it is 1 in all per prompt."""
    logprobs_QNR = world.token_logprobs(policy).detach()
    prob_QN = logprobs_QNR.sum(2).exp()
    P = max(map(len, world.prompts))
    rows, masks, behaviour, finished, probs = [], [], [], [], []
    for q, prompt in enumerate(world.prompts):
        for pair in itertools.product(range(len(world.answers)), repeat=2):
            for n in pair:
                answer = world.answers[n]
                filled = answer + [PAD] * (world.length - len(answer))
                rows.append([PAD] * (P - len(prompt)) + prompt + filled)
                masks.append(
                    [0] * (P - len(prompt)) + [1] * (len(prompt) + len(answer)) + [0] * (len(filled) - len(answer))
                )
                behaviour.append(logprobs_QNR[q, n])
                finished.append(answer[-1] == EOS)
                probs.append(prob_QN[q, pair[0]] * prob_QN[q, pair[1]])
    mask_BT = torch.tensor(masks).bool()
    rollout = Rollout(
        tokens_BT=torch.tensor(rows),
        mask_BT=mask_BT,
        response_mask_BR=mask_BT[:, P:],
        behaviour_logprobs_BR=torch.stack(behaviour).float(),
        finished_B=torch.tensor(finished),
    )
    return rollout, torch.stack(probs).float()


def experience_of(world: World, rollout: Rollout, models: Models, config: PPOConfig) -> Experience:
    rewards = reward_set(world_config(config, seed=0), models)
    scores = score_rollout(rollout, models, rewards(Responses(rollout, [], [])), config)
    nothing_B = torch.zeros(len(rollout.finished_B), dtype=torch.bool)
    combined = rewards.combine(scores.rewards_BN, scores.failed_BN, nothing_B)
    return make_experience(rollout, scores, combined, estimator_of(config), config, config.kl_coef)[0]


def weighted(experience: Experience, prob_B: Tensor) -> Experience:
    return dataclasses.replace(
        experience,
        weight_BR=experience.weight_BR * prob_B[:, None],
        denominator_B=experience.denominator_B * prob_B,
    )


# --- by definition ----------------------------------------------------------------------------------------------------


def their_gradient(world: World, policy: nn.Module, advantage: str) -> dict[str, Tensor]:
    """Of minus the objective, in float64."""
    policy, reference = copy.deepcopy(policy).double(), copy.deepcopy(world.reference).double()
    logprobs_QNR, ref_QNR = world.token_logprobs(policy), world.token_logprobs(reference).detach()
    lengths_N = torch.tensor([len(answer) for answer in world.answers]).double()
    objective = OBJECTIVES[advantage](logprobs_QNR, ref_QNR, world.rewards_QN, lengths_N)
    named = dict(policy.named_parameters())
    gradients = torch.autograd.grad(-objective, list(named.values()))
    return dict(zip(named, gradients, strict=True))


def rloo(logprobs_QNR: Tensor, ref_QNR: Tensor, rewards_QN: Tensor, lengths_N: Tensor) -> Tensor:
    log_QN, prob_QN = logprobs_QNR.sum(2), logprobs_QNR.sum(2).exp()
    worth_QN = rewards_QN - BETA * (log_QN - ref_QNR.sum(2))
    return (prob_QN * worth_QN).sum(1).mean() / (prob_QN.detach() * lengths_N).sum(1).mean()


def dr_grpo(logprobs_QNR: Tensor, ref_QNR: Tensor, rewards_QN: Tensor, lengths_N: Tensor) -> Tensor:
    del lengths_N
    prob_QN = logprobs_QNR.sum(2).exp()
    earned = (prob_QN * rewards_QN).sum(1).mean() / 2
    kl = (prob_QN.detach() * k3(logprobs_QNR, ref_QNR).sum(2)).sum(1).mean()
    return (earned - BETA * kl) / LENGTH


def grpo(logprobs_QNR: Tensor, ref_QNR: Tensor, rewards_QN: Tensor, lengths_N: Tensor) -> Tensor:
    prob_QN = logprobs_QNR.sum(2).exp().detach()
    gap_QNN = rewards_QN[:, :, None] - rewards_QN[:, None, :]  # to every other answer
    won_QNN = gap_QNN / 2 / (gap_QNN.abs() / 2**0.5 + 1e-4)
    won_QN = (won_QNN * prob_QN[:, None, :]).sum(2)
    per_token_QNR = won_QN[:, :, None] * logprobs_QNR - BETA * k3(logprobs_QNR, ref_QNR)
    return (prob_QN * per_token_QNR.sum(2) / lengths_N).sum(1).mean()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    return (ref_logprobs - logprobs).exp() - 1 - (ref_logprobs - logprobs)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"rloo": rloo, "dr_grpo": dr_grpo, "grpo": grpo}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    one, other = (torch.cat([side[name].double().flatten() for name in sorted(ours)]) for side in (ours, theirs))
    return float((one - other).norm() / other.norm())


# --- tests ------------------------------------------------------------------------------------------------------------


def test_pairs_are_all_that_can_happen(world, moved):
    _, prob_B = all_pairs(world, moved)
    assert float(prob_B.sum()) == pytest.approx(2 * len(world.prompts), abs=1e-5)  # two rows each


@pytest.mark.parametrize("advantage", OBJECTIVES)
def test_the_expected_gradient_is_that_of_the_definition(world, moved, advantage):
    assert distance(our_gradient(world, moved, advantage), their_gradient(world, moved, advantage)) < NEAR


@pytest.mark.parametrize(("advantage", "other"), itertools.permutations(OBJECTIVES, 2))
def test_no_estimator_has_the_gradient_of_another(world, moved, advantage, other):
    """Whatever the length of the step: the control."""
    theirs, others = (their_gradient(world, moved, name) for name in (advantage, other))
    one, two = (torch.cat([g.flatten() for g in side.values()]) for side in (theirs, others))
    assert torch.cosine_similarity(one, two, dim=0) < 0.99


# --- faults: the test can fail ----------------------------------------------------------------------------------------


def kl_in_the_reward(patch: pytest.MonkeyPatch) -> str:
    patch.setitem(ADVANTAGES, "dr_grpo", dataclasses.replace(ADVANTAGES["dr_grpo"], kl="reward"))
    return "dr_grpo"


def mean_over_tokens(patch: pytest.MonkeyPatch) -> str:
    patch.setitem(ADVANTAGES, "grpo", dataclasses.replace(ADVANTAGES["grpo"], loss_mean="token"))
    return "grpo"


def own_reward_in_the_baseline(patch: pytest.MonkeyPatch) -> str:
    """Without a critic, the mean of the whole group: half of the gradient."""
    patch.setitem(ADVANTAGES, "rloo", dataclasses.replace(ADVANTAGES["rloo"], advantages=advantages.dr_grpo))
    return "rloo"


def biased_deviation(patch: pytest.MonkeyPatch) -> str:
    def scaled(signals: Any, gamma: float, gae_lambda: float) -> Tensor:
        return advantages.grpo(signals, gamma, gae_lambda) * 2**0.5

    patch.setitem(ADVANTAGES, "grpo", dataclasses.replace(ADVANTAGES["grpo"], advantages=scaled))
    return "grpo"


def no_penalty_for_a_missing_eos(patch: pytest.MonkeyPatch) -> str:
    final = experience_module._final_scores
    free = lambda combined, finished_B, *rest: final(combined, torch.ones_like(finished_B), *rest)
    patch.setattr(experience_module, "_final_scores", free)
    return "rloo"


@pytest.mark.parametrize(
    "fault",
    [kl_in_the_reward, mean_over_tokens, own_reward_in_the_baseline, biased_deviation, no_penalty_for_a_missing_eos],
)
def test_a_wrong_estimator_is_far_off(world, moved, monkeypatch, fault):
    advantage = fault(monkeypatch)
    assert distance(our_gradient(world, moved, advantage), their_gradient(world, moved, advantage)) > FAR

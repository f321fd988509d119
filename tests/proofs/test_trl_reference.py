"""Our PPO against the numbers of TRL's own: tests/golden/trl_ppo.*, written by `python -m benchmarks.trl_reference`.

Both sides have the same weights and the same answers. Scores come from one set of weights and the update starts at
another, so ratios, clipping and approximate KL are not trivial. Cases: `full`, where every answer fills its six slots
and both mean the same throughout; `ragged`, one to six tokens with γ = λ = 1; `discounted`, the same with γ = 0.9,
λ = 0.8. What differs on purpose is in test_trl_differences.py.

Everything is float32. Forward passes go other ways (a cache in TRL's generation, padding cut off in ours), which costs a
few last digits of numbers up to 5; `pytest -s` prints the largest difference of each quantity.
"""

import pytest
import torch

from rlhf.algorithms.kl import k1
from rlhf.algorithms.losses import policy_loss, value_loss
from rlhf.algorithms.reward_shaping import token_rewards
from rlhf.models.policy import PolicyModel
from tests.proofs.trl_golden import (
    AGREEING,
    SETTINGS,
    assert_near,
    assert_same_gradients,
    bessel,
    case,
    causal,
    in_rollout_order,
    our_token_rewards,
    trls_gradients,
    updated,
)

# --- where both mean the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGREEING)
def test_masks_and_ends_agree(name):
    """An EOS in the last slot is an end for both, and the penalty for none is subtracted by both."""
    given = case(name)
    assert torch.equal(given.rollout.response_mask_BR, ~given.trl.padding_mask)
    assert torch.equal(given.rollout.finished_B, given.trl.contain_eos_token)
    assert given.rollout.finished_B.tolist().count(False) == 2


@pytest.mark.parametrize("name", AGREEING)
@pytest.mark.parametrize("quantity", ["logprobs", "ref_logprobs", "values"])
def test_what_the_models_say_of_each_token(name, quantity):
    given = case(name)
    mask = given.rollout.response_mask_BR
    assert_near(f"{name} {quantity}", getattr(given.scores, f"{quantity}_BR")[mask], getattr(given.trl, quantity)[mask])


@pytest.mark.parametrize("name", AGREEING)
def test_scores_less_the_penalty(name):
    given = case(name)
    penalty_B = SETTINGS["missing_eos_penalty"] * (~given.rollout.finished_B).float()
    assert_near(f"{name} scores", given.score_B - penalty_B, given.trl.scores)


@pytest.mark.parametrize("name", AGREEING)
def test_kl_and_its_share_of_the_reward(name):
    given = case(name)
    kl_BR = k1(given.scores.logprobs_BR, given.scores.ref_logprobs_BR)
    mask = given.rollout.response_mask_BR
    assert_near(f"{name} kl", kl_BR[mask], given.trl.kl[mask])
    assert_near(f"{name} kl of an answer", getattr(given, "ppo/kl"), given.trl.metrics["objective/kl"])
    without_score = token_rewards(torch.zeros(8), kl_BR, given.config.kl_coef, mask)
    assert_near(f"{name} non-score reward", without_score, given.trl.non_score_reward)


def test_rewards_of_answers_that_fill_their_slots():
    given = case("full")
    assert_near("full rewards", our_token_rewards(given), given.trl.rewards)


@pytest.mark.parametrize("name", AGREEING)
def test_returns_and_advantages(name):
    given = case(name)
    mask = given.rollout.response_mask_BR
    ours = given.experience
    assert_near(f"{name} returns", ours.returns_BR[mask], given.trl.returns[mask])
    unwhitened_BR = ours.returns_BR - ours.old_values_BR
    assert_near(f"{name} advantages, raw", unwhitened_BR[mask], given.trl.advantages_before_whitening[mask])
    assert_near(f"{name} advantages, whitened", bessel(given) * ours.advantages_BR, given.trl.advantages)


@pytest.mark.parametrize("name", AGREEING)
def test_ratios(name):
    given = case(name)
    trl = given.trl.micro_batches[0]
    mask = given.rollout.response_mask_BR
    with torch.no_grad():
        logprobs_BR, _ = PolicyModel(causal("policy_moved"))(given.rollout.tokens_BT, given.rollout.mask_BT, 6, 0.7)
    ratio_BR = (logprobs_BR - given.scores.logprobs_BR).exp()
    assert_near(f"{name} new logprobs", logprobs_BR[mask], in_rollout_order(trl, "new_logprobs")[mask])
    assert_near(f"{name} ratio", ratio_BR[mask], in_rollout_order(trl, "ratio")[mask])


def test_the_loss_functions_alone_on_trls_own_tensors():
    trl, part = case("full").trl, case("full").trl.micro_batches[0]
    new_BR, vpred_BR = in_rollout_order(part, "new_logprobs"), in_rollout_order(part, "vpred")
    every = torch.ones(8, 6).bool()
    policy = policy_loss(new_BR, trl.logprobs, trl.advantages, every, SETTINGS["cliprange"], every)
    value = value_loss(vpred_BR, trl.values, trl.returns, every, SETTINGS["cliprange_value"])
    assert_near("policy loss alone", policy.sum / policy.count, trl.metrics["pg_loss_stats"][0])
    assert_near("value loss alone", value.sum / value.count, trl.metrics["vf_loss_stats"][0])


FIGURES = {
    "ppo/policy_loss": "pg_loss_stats",
    "ppo/clip_fraction": "pg_clipfrac_stats",
    "ppo/approx_kl": "approxkl_stats",
    "ppo/entropy": "entropy_stats",
    "ppo/value_loss": "vf_loss_stats",
    "ppo/value_clip_fraction": "vf_clipfrac_stats",
}


@pytest.mark.parametrize(
    ("name", "figure"),
    [("full", figure) for figure in FIGURES] + [("ragged", "ppo/policy_loss"), ("ragged", "ppo/clip_fraction")],
)
def test_figures_of_the_update(name, figure):
    given = case(name)
    (trl,) = given.trl.metrics[FIGURES[figure]]
    assert trl.abs() > 1e-2  # nothing is compared that happens to be 0
    assert_near(f"{name} {figure}", updated(given).metrics[figure], trl)


@pytest.mark.parametrize("name", AGREEING)
def test_gradient_of_every_parameter_of_the_policy(name):
    given = case(name)
    assert_same_gradients(f"{name} policy gradient", updated(given).policy, trls_gradients(given, "policy"))


def test_gradient_of_every_parameter_of_the_critic_but_for_the_weight_of_its_loss():
    """TRL adds 0.1 · value loss to the policy's; our critic has an optimizer of its own, where a factor has no place."""
    given = case("full")
    weighted = {name: SETTINGS["vf_coef"] * gradient for name, gradient in updated(given).critic.items()}
    assert_same_gradients("full critic gradient", weighted, trls_gradients(given, "value"))

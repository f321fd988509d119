"""Our PPO against the numbers of TRL's own: tests/golden/trl_ppo.*, written by `python -m benchmarks.trl_reference`.

Both sides have the same weights and the same answers. Scores come from one set of weights and the update starts at
another, so ratios, clipping and approximate KL are not trivial. Cases: `full`, where every answer fills its six slots
and both mean the same throughout; `ragged`, one to six tokens with γ = λ = 1; `discounted`, the same with γ = 0.9,
λ = 0.8. What differs on purpose is below under "where we differ", each with TRL's rule in its name.

Everything is float32. Forward passes go other ways (a cache in TRL's generation, padding cut off in ours), which costs a
few last digits of numbers up to 5; `pytest -s` prints the largest difference of each quantity.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.algorithms.advantages import gae
from rlhf.algorithms.kl import approx_kl, k1
from rlhf.algorithms.losses import policy_loss, value_loss
from rlhf.algorithms.masked import masked_mean_and_var, whiten
from rlhf.algorithms.reward_shaping import token_rewards
from rlhf.config import HardwareConfig, OptimConfig, PPOConfig, SamplingConfig
from rlhf.data.batches import Rollout, select
from rlhf.distributed.engine import LocalEngine
from rlhf.models import ScalarModel
from rlhf.models.policy import PolicyModel
from rlhf.ppo.experience import make_experience
from rlhf.ppo.scoring import score_rollout
from rlhf.ppo.update import update
from rlhf.rewards import ModelReward, Responses, RewardSet, weighted_sum

FILE = Path(__file__).parents[1] / "golden" / "trl_ppo.json"
GOLDEN = json.loads(FILE.read_text())
TENSORS = load_file(FILE.with_suffix(".safetensors"))
SETTINGS = GOLDEN["settings"]
TOLERANCE = 1e-5
AGREEING = ["full", "ragged"]


def assert_near(quantity, ours, trls, tolerance=TOLERANCE):
    ours, trls = torch.as_tensor(ours), torch.as_tensor(trls)
    assert ours.shape == trls.shape
    difference = float((ours - trls).abs().max())
    print(f"{quantity:32} {difference:.1e}")
    assert difference <= tolerance, f"{quantity}: {difference:.1e}"


# --- the same weights, the same answers -----------------------------------------------------------------------------


def weights(model):
    start = f"weights/{model}/"
    return {name.removeprefix(start): tensor.clone() for name, tensor in TENSORS.items() if name.startswith(start)}


def causal(model, state=None):
    llama = LlamaForCausalLM(LlamaConfig(**GOLDEN["shape"])).eval()
    llama.load_state_dict(state or weights(model))
    return llama


def scalar(model):
    state = weights(model)
    head_1H = state.pop("score.weight")
    untrained = LlamaForCausalLM(LlamaConfig(**GOLDEN["shape"]))
    return ScalarModel(causal(model, state | {"lm_head.weight": untrained.lm_head.weight}).base_model, head_1H)


class RecordingEngine(LocalEngine):
    """Keeps the gradients of its last step by TRL's names."""

    def step(self):
        names = ("causal.", ""), ("backbone.", "model."), ("head.weight", "score.weight")
        self.gradients = {}
        for name, parameter in self.module.named_parameters():
            for ours, trls in names:
                name = trls + name.removeprefix(ours) if name.startswith(ours) else name
            assert parameter.grad is not None
            self.gradients[name] = parameter.grad.clone()
        return super().step()


def engine(module, optim=None):
    return RecordingEngine(module, optim, 1, HardwareConfig())


@functools.cache
def case(name):
    """What TRL recorded (`trl`), and what our functions make of the same rollout."""
    made = GOLDEN["cases"][name]
    trl = SimpleNamespace(**{key: torch.tensor(value) for key, value in made["iteration"].items()})
    trl.micro_batches = [{key: torch.tensor(value) for key, value in part.items()} for part in made["micro_batches"]]
    trl.metrics = {key: torch.tensor(value) for key, value in made["figures"].items()}
    start = f"gradients/{name}/"
    trl.gradients = {key.removeprefix(start): TENSORS[key] for key in TENSORS if key.startswith(start)}
    settings = made["settings"]
    config = PPOConfig(
        batch_size=8,
        minibatch_size=8,
        micro_batch_size=8,
        sampling=SamplingConfig(temperature=SETTINGS["temperature"]),
        kl_coef=SETTINGS["kl_coef"],
        gamma=settings["gamma"],
        gae_lambda=settings["lam"],
        clip_range=SETTINGS["cliprange"],
        value_clip_range=SETTINGS["cliprange_value"],
        whiten_rewards=settings.get("whiten_rewards", False),
        missing_eos_penalty=SETTINGS["missing_eos_penalty"],
        optim=OptimConfig(lr=0.0),
        critic_optim=OptimConfig(lr=0.0),
    )
    rollout = rollout_of(trl)
    reward = ModelReward(engine(scalar("reward")), config)
    models: Any = SimpleNamespace(
        policy=engine(PolicyModel(causal("policy"))),
        reference=engine(PolicyModel(causal("reference"))),
        critic=engine(scalar("value")),
    )
    rewards = RewardSet({"reward": reward}, weighted_sum([1.0]))
    scores = score_rollout(rollout, models, rewards(Responses(rollout, prompts=[], texts=[])), config)
    combined = rewards.combine(scores.rewards_BN, scores.failed_BN, torch.zeros(8).bool())
    experience, metrics = make_experience(rollout, scores, combined, config, config.kl_coef)
    score_B = combined.score_B
    return SimpleNamespace(
        trl=trl, config=config, rollout=rollout, scores=scores, score_B=score_B, experience=experience, **metrics
    )


def rollout_of(trl):
    """TRL's answers as ours: masks from the lengths of prompt and answer, an answer ends with its first EOS."""
    P, tokens_BT = int(trl.context_length), trl.query_responses
    answers = [row.tolist() for row in tokens_BT[:, P:]]
    finished = [GOLDEN["eos"] in answer for answer in answers]
    lengths = [a.index(GOLDEN["eos"]) + 1 if ended else len(a) for a, ended in zip(answers, finished, strict=True)]
    response_mask_BR = torch.arange(tokens_BT.shape[1] - P) < torch.tensor(lengths)[:, None]
    return Rollout(
        tokens_BT=tokens_BT,
        mask_BT=torch.cat([tokens_BT[:, :P] != GOLDEN["pad"], response_mask_BR], 1),
        response_mask_BR=response_mask_BR,
        behaviour_logprobs_BR=trl.logprobs,
        finished_B=torch.tensor(finished),
    )


def updated(given, index=slice(None)):
    """Figures and gradients of our update over some rows, whitened with TRL's variance, from the moved weights."""
    experience = select(given.experience, index)
    experience = dataclasses.replace(experience, advantages_BR=bessel(given) * experience.advantages_BR)
    config = given.config.model_copy(update={"minibatch_size": 8, "micro_batch_size": 8})
    policy = engine(PolicyModel(causal("policy_moved")), config.optim)
    critic = engine(scalar("value_moved"), config.critic_optim)
    metrics = update(policy, critic, experience, config, (0, 1), config.kl_coef)
    return SimpleNamespace(metrics=metrics, policy=policy.gradients, critic=critic.gradients)


def bessel(given):
    """TRL divides the variance by n - 1, so its whitened advantages are smaller by √((n - 1)/n)."""
    n = int(given.rollout.response_mask_BR.sum())
    return math.sqrt((n - 1) / n)


def in_rollout_order(micro_batch, key):
    """TRL shuffles the rows of an update."""
    return micro_batch[key][micro_batch["micro_batch_inds"].argsort()]


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


def our_token_rewards(given):
    kl_BR = k1(given.scores.logprobs_BR, given.scores.ref_logprobs_BR)
    final_B = given.score_B - given.config.missing_eos_penalty * (~given.rollout.finished_B).float()
    return token_rewards(final_B, kl_BR, given.config.kl_coef, given.rollout.response_mask_BR)


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


def assert_same_gradients(quantity, ours, trls):
    assert ours.keys() == trls.keys()
    flat, expected = (torch.cat([side[key].flatten() for key in sorted(ours)]) for side in (ours, trls))
    assert_near(quantity, flat, expected)
    assert_near(f"{quantity}, norm", flat.norm(), expected.norm())
    assert expected.norm() > 0.01


def trls_gradients(given, model):
    start = f"{model}/"
    gradients = given.trl.gradients
    return {name.removeprefix(start): gradients[name] for name in gradients if name.startswith(start)}


@pytest.mark.parametrize("name", AGREEING)
def test_gradient_of_every_parameter_of_the_policy(name):
    given = case(name)
    assert_same_gradients(f"{name} policy gradient", updated(given).policy, trls_gradients(given, "policy"))


def test_gradient_of_every_parameter_of_the_critic_but_for_the_weight_of_its_loss():
    """TRL adds 0.1 · value loss to the policy's; our critic has an optimizer of its own, where a factor has no place."""
    given = case("full")
    weighted = {name: SETTINGS["vf_coef"] * gradient for name, gradient in updated(given).critic.items()}
    assert_same_gradients("full critic gradient", weighted, trls_gradients(given, "value"))


# --- where we differ ------------------------------------------------------------------------------------------------


def test_trl_gives_the_score_one_slot_after_eos_and_we_on_it():
    given = case("ragged")
    ours, ended_early_B = our_token_rewards(given), ~given.rollout.response_mask_BR[:, -1]
    assert int(ended_early_B.sum()) == 5
    assert_near("ragged rewards, full rows", ours[~ended_early_B], given.trl.rewards[~ended_early_B])
    lengths_B = given.rollout.response_mask_BR.sum(1)
    moved_BR = given.trl.rewards.clone()
    for row in ended_early_B.nonzero().flatten().tolist():
        last = int(lengths_B[row]) - 1
        moved_BR[row, last] += moved_BR[row, last + 1].clone()
        moved_BR[row, last + 1] = 0.0
    assert_near("ragged rewards, moved to EOS", ours, moved_BR)


def test_trl_discounts_over_the_slot_after_eos_and_we_do_not():
    """GAE itself agrees: given TRL's rewards, values and mask, which count the slot after EOS, it gives TRL's numbers."""
    given = case("discounted")
    trl, mask = given.trl, given.rollout.response_mask_BR
    advantages_BR, returns_BR = gae(trl.rewards, trl.values, ~trl.padding_mask_p1, 0.9, 0.8)
    assert_near("discounted GAE, TRL's mask", advantages_BR[mask], trl.advantages_before_whitening[mask])
    assert_near("discounted returns, TRL's mask", returns_BR[mask], trl.returns[mask])
    ended_early_B = ~mask[:, -1]
    difference_BR = (given.experience.returns_BR - trl.returns).abs()
    assert difference_BR[~ended_early_B].max() < TOLERANCE
    assert all(difference_BR[ended_early_B][:, 0] > 1e-2)


def test_trl_counts_the_slot_after_eos_in_the_value_loss_and_we_do_not():
    given = case("ragged")
    (micro_batch,) = given.trl.micro_batches
    vpred_BR, trl = in_rollout_order(micro_batch, "vpred"), given.trl

    def mean(mask_BR):
        loss = value_loss(vpred_BR, trl.values, trl.returns, mask_BR, SETTINGS["cliprange_value"])
        return float(loss.sum / loss.count), float(loss.clipped_sum / loss.count)

    with_slot, clipped_with_slot = mean(~trl.padding_mask_p1)
    assert_near("ragged value loss, TRL's mask", with_slot, trl.metrics["vf_loss_stats"][0])
    assert_near("ragged value clip share, TRL's", clipped_with_slot, trl.metrics["vf_clipfrac_stats"][0])
    without_slot, clipped_without_slot = mean(~trl.padding_mask)
    ours = updated(given).metrics
    assert_near("ragged value loss", ours["ppo/value_loss"], without_slot)
    assert_near("ragged value clip share", ours["ppo/value_clip_fraction"], clipped_without_slot)
    assert abs(with_slot - without_slot) > 1e-2


def test_trl_divides_the_variance_by_n_less_1_and_we_by_n():
    given = case("ragged")
    trl, mask = given.trl, given.rollout.response_mask_BR
    n, raw = int(mask.sum()), given.trl.advantages_before_whitening
    mean, var = masked_mean_and_var(raw, mask)
    assert_near("whitening with n - 1", whiten(raw, mean, var * n / (n - 1), mask, shift_mean=True), trl.advantages)
    assert_near("whitening with n", whiten(raw, mean, var, mask, shift_mean=True), given.experience.advantages_BR)


def test_trl_whitens_each_ranks_advantages_alone_and_we_those_of_all_ranks():
    """`advantages_of_two_ranks`: TRL's masked_whiten on either half of the rows, which is all that a rank of it sees."""
    given = case("ragged")
    raw, mask = given.trl.advantages_before_whitening, given.rollout.response_mask_BR
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        n = int(mask[half].sum())
        mean, var = masked_mean_and_var(raw[half], mask[half])
        halves.append(whiten(raw[half], mean, var * n / (n - 1), mask[half], shift_mean=True))
    by_rank_BR = torch.where(mask, given.trl.advantages_of_two_ranks, 0.0)
    assert_near("whitening by rank", torch.cat(halves), by_rank_BR)
    assert (by_rank_BR - given.trl.advantages).abs().max() > 0.1


def test_trl_averages_approx_kl_over_padding_and_we_over_tokens():
    given = case("ragged")
    mask = given.rollout.response_mask_BR
    ours = updated(given).metrics["ppo/approx_kl"]
    new_BR = in_rollout_order(given.trl.micro_batches[0], "new_logprobs")
    assert_near("ragged approx KL", ours, approx_kl(new_BR, given.trl.logprobs)[mask].mean())
    share = float(mask.float().mean())
    assert_near("ragged approx KL with padding", ours * share, given.trl.metrics["approxkl_stats"][0])
    assert share < 0.75


def test_trl_averages_entropy_over_padding_and_we_over_tokens():
    given = case("ragged")
    tokens_BT, mask_BT = given.rollout.tokens_BT, given.rollout.mask_BT.long()
    with torch.no_grad():
        out = causal("policy_moved")(tokens_BT, attention_mask=mask_BT, position_ids=mask_BT.cumsum(1) - mask_BT)
    entropy_BR = torch.distributions.Categorical(logits=out.logits[:, -7:-1] / 0.7).entropy()
    assert_near("ragged entropy with padding", entropy_BR.mean(), given.trl.metrics["entropy_stats"][0])
    ours = updated(given).metrics["ppo/entropy"]
    assert_near("ragged entropy", ours, entropy_BR[given.rollout.response_mask_BR].mean())
    assert abs(ours - float(entropy_BR.mean())) > 1e-2


def test_trls_loss_is_the_mean_of_micro_batch_means_and_ours_the_global_mean():
    given = case("two_micro_batches")
    means, sums, counts = [], [], []
    for part in given.trl.micro_batches:
        per_token = part["pg_loss_max"][given.rollout.response_mask_BR[part["micro_batch_inds"]]]
        means.append(per_token.mean())
        sums.append(per_token.sum())
        counts.append(len(per_token))
    assert_near("mean of two means", sum(means) / 2, given.trl.metrics["pg_loss_stats"].mean())
    ours = updated(given).metrics["ppo/policy_loss"]
    assert_near("global mean", ours, sum(sums) / sum(counts))
    assert abs(ours - float(given.trl.metrics["pg_loss_stats"].mean())) > 1e-2


def test_trls_gradient_is_the_mean_of_micro_batch_gradients_and_ours_that_of_the_global_mean():
    given = case("two_micro_batches")
    parts = [updated(given, part["micro_batch_inds"]).policy for part in given.trl.micro_batches]
    averaged = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    trls = trls_gradients(given, "policy")
    assert_same_gradients("mean of two gradients", averaged, trls)
    together = updated(given).policy
    assert_same_gradients("gradient of the global mean", together, trls_gradients(case("ragged"), "policy"))
    assert max(float((together[name] - trls[name]).abs().max()) for name in trls) > 1e-2


def test_trl_whitens_token_rewards_with_their_kl_and_we_only_divide_scores():
    given = case("whitened_rewards")
    trl, mask_p1 = given.trl, ~given.trl.padding_mask_p1
    n, raw = int(mask_p1.sum()), trl.rewards_before_whitening
    mean, var = masked_mean_and_var(raw, mask_p1)
    whitened_BR = torch.where(mask_p1, whiten(raw, mean, var * n / (n - 1), mask_p1, shift_mean=True) + mean, 0.0)
    assert_near("TRL's whitened rewards", whitened_BR, trl.rewards)
    # With γ = λ = 1 the return of the first token is the whole answer's: score / σ - penalty - β · KL.
    score_B, kl_BR = given.score_B, k1(given.scores.logprobs_BR, given.scores.ref_logprobs_BR)
    kl_B = torch.where(given.rollout.response_mask_BR, kl_BR, 0.0).sum(1)
    expected_B = score_B / score_B.std(correction=0) - 0.9 * (~given.rollout.finished_B).float() - 0.3 * kl_B
    assert_near("our whitened scores", given.experience.returns_BR[:, 0], expected_B)

"""The update against a plain loop over unpadded rows, and what may not change it."""

import dataclasses
import math

import pytest
import torch

from rlhf.algorithms.advantages import ADVANTAGES
from rlhf.config import HardwareConfig, OptimConfig, PPOConfig
from rlhf.data.batches import select
from rlhf.distributed.engine import LocalEngine
from rlhf.models.policy import PolicyModel
from rlhf.ppo.advantage_setting import estimator_of
from rlhf.ppo.experience import make_experience
from rlhf.ppo.update import minibatches, update
from rlhf.rewards import Combined

CLIP, VALUE_CLIP, BETA = 0.2, 0.1, 0.3


@pytest.fixture
def updated(make_llama, make_scalar, iteration, ppo_config):
    """updated(…) → the policy and the critic after one update, and its figures."""

    def run(experience=iteration.experience, with_critic=True, **settings):
        config = ppo_config.model_copy(update=settings)
        policy, critic = PolicyModel(make_llama(0), config.packing), make_scalar(2)
        critic.packing = config.packing
        metrics = update(
            LocalEngine(policy, config.optim, 4, HardwareConfig()),
            LocalEngine(critic, config.critic_optim, 4, HardwareConfig()) if with_critic else None,
            experience,
            config,
            key=(0, 1),
            kl_loss_coef=estimator_of(config).kl_loss_coef(BETA),
        )
        return policy, critic, metrics

    return run


def assert_same_weights(one, other, atol=0.0):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# --- one step -------------------------------------------------------------------------------------------------------


@pytest.fixture
def drifted(iteration):
    """The iteration with ratios that begin at e^±.15, between the two clips, and importance weights that are not 1."""
    given = iteration.experience
    third = torch.arange(given.response_mask_BR.numel()).view(given.response_mask_BR.shape) % 3
    return dataclasses.replace(
        given,
        old_logprobs_BR=given.old_logprobs_BR + torch.where(third == 0, 0.15, -0.15),
        importance_BR=given.importance_BR * (0.5 + third),
    )


def token_losses(llama, critic, experience, i):
    """Policy loss, k3 to the reference and value loss of each token of row i, without padding, as in the papers."""
    P = experience.tokens_BT.shape[1] - experience.response_mask_BR.shape[1]
    tokens = experience.tokens_BT[i][experience.mask_BT[i]]
    first, length = int(experience.mask_BT[i, :P].sum()), int(experience.response_mask_BR[i].sum())
    names = ("old_logprobs_BR", "ref_logprobs_BR", "advantages_BR", "importance_BR", "old_values_BR", "returns_BR")
    old, ref, advantages, importance, old_values, returns = (getattr(experience, name)[i, :length] for name in names)
    logits = llama(tokens[None]).logits[0, first - 1 : -1] / 0.7
    logprobs = torch.log_softmax(logits, -1)[range(length), tokens[first:]]
    ratio = (logprobs - old).exp()
    policy = importance * torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    values = critic(tokens[None], torch.ones_like(tokens[None]))[0, first - 1 : -1]
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    k3 = (ref - logprobs).exp() - 1 - (ref - logprobs)
    return policy, k3, 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)


def row_losses(llama, critic, experience, i):
    """Sums of policy and value loss over the tokens of row i."""
    policy, _, value = token_losses(llama, critic, experience, i)
    return policy.sum(), value.sum()


def adamw(model):
    decayed, others = ([p for p in model.parameters() if (p.dim() >= 2) is wide] for wide in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5)


def test_two_steps_are_those_of_a_plain_loop(updated, make_llama, make_scalar, drifted):
    llama, critic = make_llama(0), make_scalar(2)
    count = drifted.response_mask_BR.sum()
    optimizers = [adamw(model) for model in (llama, critic)]
    norms = []
    for _ in range(2):
        losses = [row_losses(llama, critic, drifted, i) for i in range(8)]
        for model, optimizer, total in zip(
            (llama, critic), optimizers, map(sum, zip(*losses, strict=True)), strict=True
        ):
            optimizer.zero_grad()
            (total / count).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
    policy, trained_critic, metrics = updated(drifted, epochs=2, clip_range=CLIP, value_clip_range=VALUE_CLIP)
    assert_same_weights(policy, llama, atol=1e-4)
    assert_same_weights(trained_critic, critic, atol=1e-4)
    assert metrics["ppo/grad_norm"] == pytest.approx((norms[0] + norms[2]) / 2, rel=1e-4)
    assert metrics["ppo/critic_grad_norm"] == pytest.approx((norms[1] + norms[3]) / 2, rel=1e-4)
    moved = max(
        float((a - b).abs().max()) for a, b in zip(policy.parameters(), make_llama(0).parameters(), strict=True)
    )
    assert moved > 1e-2


def test_each_minibatch_is_divided_by_its_own_tokens(updated, make_llama, make_scalar, drifted, ppo_config):
    llama, critic, norms = make_llama(0), make_scalar(2), []
    for index in minibatches(8, ppo_config.model_copy(update={"minibatch_size": 2, "epochs": 1}), 0, 1):
        count = drifted.response_mask_BR[index].sum()
        losses = [row_losses(llama, critic, drifted, i) for i in index.tolist()]
        for model, total in zip((llama, critic), map(sum, zip(*losses, strict=True)), strict=True):
            gradient = torch.autograd.grad(total / count, list(model.parameters()), allow_unused=True)
            norms.append(float(torch.cat([g.flatten() for g in gradient if g is not None]).norm()))
    still = OptimConfig(lr=0.0)
    _, _, metrics = updated(
        drifted,
        epochs=1,
        minibatch_size=2,
        clip_range=CLIP,
        value_clip_range=VALUE_CLIP,
        optim=still,
        critic_optim=still,
    )
    assert metrics["ppo/grad_norm"] == pytest.approx(sum(norms[::2]) / 4, rel=1e-4)
    assert metrics["ppo/critic_grad_norm"] == pytest.approx(sum(norms[1::2]) / 4, rel=1e-4)


def test_the_first_step_starts_at_the_policy_that_sampled(updated, iteration):
    _, _, metrics = updated()
    mask = iteration.experience.response_mask_BR
    advantages = (iteration.experience.advantages_BR * iteration.experience.importance_BR)[mask]
    assert metrics["ppo/approx_kl"] < 1e-10
    assert metrics["ppo/clip_fraction"] == 0
    assert metrics["ppo/value_clip_fraction"] == 0
    assert metrics["ppo/policy_loss"] == pytest.approx(-float(advantages.mean()), abs=1e-5)
    assert metrics["ppo/value_loss"] == pytest.approx(
        0.5 * float(((iteration.experience.old_values_BR - iteration.experience.returns_BR)[mask] ** 2).mean()),
        rel=1e-5,
    )


def test_figures_are_means_over_tokens(updated, make_llama, iteration):
    """Of three forward passes, with old logprobs and values that stand elsewhere: by ½ and by 0.3, up and down."""
    given = iteration.experience
    mask = given.response_mask_BR
    sign = torch.where(torch.arange(mask.numel()).view(mask.shape) % 3 == 0, -1.0, 1.0)
    moved = {
        "old_logprobs_BR": given.old_logprobs_BR - 0.5 * sign,
        "old_values_BR": given.old_values_BR - 0.3 * sign,
    }
    _, _, metrics = updated(dataclasses.replace(given, **moved), micro_batch_size=3)
    # a ratio of e^½ is clipped for a good token, one of e^-½ for a bad one
    assert metrics["ppo/clip_fraction"] == pytest.approx(float((sign * given.advantages_BR > 0)[mask].float().mean()))
    assert metrics["ppo/approx_kl"] == pytest.approx(0.125, rel=1e-4)
    # a value 0.3 above its old one may have come 0.2 of the way; clipping hides the last 0.1 where the return is above
    error = (given.old_values_BR - given.returns_BR)[mask]
    clipped = (error - 0.1 * sign[mask]) ** 2 > error**2
    assert 0 < clipped.sum() < len(clipped)
    assert metrics["ppo/value_clip_fraction"] == pytest.approx(float(clipped.float().mean()))
    P, entropies = given.tokens_BT.shape[1] - mask.shape[1], []
    for tokens, real, answer in zip(given.tokens_BT, given.mask_BT, mask, strict=True):
        first, length = int(real[:P].sum()), int(answer.sum())
        logits = make_llama(0)(tokens[real][None]).logits[0, first - 1 : first - 1 + length] / 0.7
        entropies += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert metrics["ppo/entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)


def test_later_epochs_have_left_it(updated):
    _, _, metrics = updated(epochs=3)
    assert metrics["ppo/approx_kl"] > 1e-3
    assert metrics["ppo/clip_fraction"] > 0
    assert metrics["ppo/grad_norm"] > 0 and metrics["ppo/critic_grad_norm"] > 0


def test_a_better_answer_becomes_likelier(updated, make_llama, iteration):
    """The sign: tokens of positive advantage rise, those of negative advantage fall."""
    policy, _, _ = updated(optim=OptimConfig(lr=1e-3))
    given = iteration.experience
    after, _ = policy(given.tokens_BT, given.mask_BT, given.response_mask_BR.shape[1], 0.7)
    gain = torch.where(given.response_mask_BR, (after - given.old_logprobs_BR) * given.advantages_BR, 0.0)
    assert gain.sum() > 0


def test_importance_weighs_the_policy_and_not_the_critic(updated, iteration):
    doubled = dataclasses.replace(iteration.experience, importance_BR=2 * iteration.experience.importance_BR)
    _, critic, metrics = updated(doubled)
    _, expected_critic, expected = updated()
    assert metrics["ppo/policy_loss"] == pytest.approx(2 * expected["ppo/policy_loss"], abs=1e-5)
    assert_same_weights(critic, expected_critic)


def test_a_learning_rate_of_zero_moves_nothing(updated, make_llama, make_scalar):
    still = OptimConfig(lr=0.0)
    policy, critic, metrics = updated(optim=still, critic_optim=still, epochs=3, minibatch_size=4)
    assert_same_weights(policy, PolicyModel(make_llama(0)))
    assert_same_weights(critic, make_scalar(2))
    assert metrics["ppo/approx_kl"] < 1e-10


# --- other estimators, and rows whose score failed --------------------------------------------------------------------


def experience_by(advantage, iteration, ppo_config, failed=(1, 4), **changed):
    """Experience of that estimator over the iteration's rollout, two responses to a prompt, from helpfulness alone."""
    config = ppo_config.model_copy(update={"advantage": advantage, "group_size": 2})
    failed_B = torch.zeros(8, dtype=torch.bool).index_fill(0, torch.tensor(failed, dtype=torch.long), True)
    score_B = torch.where(failed_B, 0.0, iteration.scores.rewards_BN[:, 0])
    combined = Combined(score_B, failed_B)
    made, _ = make_experience(iteration.rollout, iteration.scores, combined, estimator_of(config), config, BETA)
    return dataclasses.replace(made, **changed)


def mean_of(advantage, tokens_of_rows):
    """What the estimator divides a loss by, over the rows that count."""
    if advantage == "grpo":
        return torch.stack([tokens.mean() for tokens in tokens_of_rows]).mean()
    if advantage == "dr_grpo":
        return torch.stack([tokens.sum() for tokens in tokens_of_rows]).mean() / 9
    return torch.cat(tokens_of_rows).mean()


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_two_steps_of_every_estimator_are_those_of_a_plain_loop(
    updated, make_llama, make_scalar, iteration, ppo_config, advantage
):
    given = experience_by(advantage, iteration, ppo_config)
    third = torch.arange(given.response_mask_BR.numel()).view(given.response_mask_BR.shape) % 3
    given = dataclasses.replace(
        given,
        old_logprobs_BR=given.old_logprobs_BR + torch.where(third == 0, 0.15, -0.15),
        importance_BR=given.importance_BR * (0.5 + third),
    )
    llama, critic, losses, penalties = make_llama(0), make_scalar(2), [], []
    optimizer, counted = adamw(llama), [row for row in range(8) if row not in (1, 4)]
    for _ in range(2):
        policies, k3s, _ = zip(*(token_losses(llama, critic, given, row) for row in counted), strict=True)
        loss, penalty = mean_of(advantage, policies), mean_of(advantage, k3s)
        optimizer.zero_grad()
        (loss + BETA * penalty if "grpo" in advantage else loss).backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        penalties.append(float(penalty.detach()))
    settings = {
        "advantage": advantage,
        "group_size": 2,
        "epochs": 2,
        "clip_range": CLIP,
        "value_clip_range": VALUE_CLIP,
    }
    policy, _, metrics = updated(given, **settings, micro_batch_size=3)
    assert_same_weights(policy, llama, atol=1e-4)
    assert metrics["ppo/policy_loss"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    if "grpo" in advantage:
        assert metrics["ppo/kl_loss"] == pytest.approx(sum(penalties) / 2, rel=1e-4)
    else:
        assert "ppo/kl_loss" not in metrics


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_what_stands_in_a_failed_row_reaches_no_weight(updated, iteration, ppo_config, advantage):
    given, settings = experience_by(advantage, iteration, ppo_config), {"advantage": advantage, "group_size": 2}
    wild_B1 = ~given.counted_B[:, None]
    garbage = {name: torch.where(wild_B1, math.nan, getattr(given, name)) for name in vars(given) if is_number(name)}
    garbage["tokens_BT"] = torch.where(wild_B1, 5, given.tokens_BT)
    policy, critic, metrics = updated(dataclasses.replace(given, **garbage), **settings)
    expected_policy, expected_critic, expected = updated(given, **settings)
    assert_same_weights(policy, expected_policy)
    assert_same_weights(critic, expected_critic)
    assert metrics == expected


def is_number(name):
    return name.endswith("_BR") and name not in ("response_mask_BR", "weight_BR")


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_an_update_with_failed_rows_is_the_update_without_them(updated, iteration, ppo_config, advantage):
    """Whole groups have failed here, so that the rest are groups too."""
    given = experience_by(advantage, iteration, ppo_config, failed=(2, 3))
    settings = {"advantage": advantage, "group_size": 2, "epochs": 3}
    policy, critic, metrics = updated(given, **settings)
    rest = select(given, [0, 1, 4, 5, 6, 7])
    expected_policy, expected_critic, expected = updated(rest, **settings, minibatch_size=6, batch_size=6)
    assert_same_weights(policy, expected_policy, atol=1e-5)
    assert_same_weights(critic, expected_critic, atol=1e-5)
    assert metrics == {name: pytest.approx(value, abs=1e-5, rel=1e-5) for name, value in expected.items()}


def test_without_a_critic_the_policy_learns_the_same_and_nothing_is_said_of_values(updated, iteration, ppo_config):
    given, settings = experience_by("grpo", iteration, ppo_config), {"advantage": "grpo", "group_size": 2}
    policy, untouched, metrics = updated(given, with_critic=False, **settings)
    expected_policy, _, expected = updated(given, **settings)
    assert_same_weights(policy, expected_policy)
    of_critic = {"ppo/value_loss", "ppo/value_clip_fraction", "ppo/critic_grad_norm"}
    assert metrics == {name: value for name, value in expected.items() if name not in of_critic}
    assert of_critic <= {*expected}
    assert all(p.grad is None for p in untouched.parameters())


def test_the_reference_moves_the_update_where_the_kl_is_in_the_loss_alone(updated, iteration, ppo_config):
    for advantage, moves in (("grpo", True), ("rloo", False)):
        given, settings = experience_by(advantage, iteration, ppo_config), {"advantage": advantage, "group_size": 2}
        other = dataclasses.replace(given, ref_logprobs_BR=given.ref_logprobs_BR - 1.0)
        gap = max(
            float((a - b).abs().max())
            for a, b in zip(
                updated(given, **settings)[0].parameters(), updated(other, **settings)[0].parameters(), strict=True
            )
        )
        assert (gap > 1e-4) is moves


# --- what changes nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit", [{"micro_batch_size": size} for size in (1, 2, 4)] + [{"micro_batch_tokens": size} for size in (1, 25, 60)]
)
@pytest.mark.parametrize("packing", [False, True])
def test_neither_the_size_of_forward_passes_nor_packing_changes_anything(updated, limit, packing):
    policy, critic, metrics = updated(**limit, packing=packing)
    expected_policy, expected_critic, expected = updated()
    assert_same_weights(policy, expected_policy, atol=1e-5)
    assert_same_weights(critic, expected_critic, atol=1e-5)
    assert metrics == {name: pytest.approx(value, abs=1e-5, rel=1e-5) for name, value in expected.items()}


def test_the_order_of_rows_changes_nothing(updated, iteration):
    shuffled = select(iteration.experience, [3, 1, 7, 0, 6, 2, 5, 4])
    assert_same_weights(updated(shuffled)[0], updated()[0], atol=1e-5)


@pytest.mark.parametrize("value", [math.nan, 1e9])
def test_what_stands_in_masked_slots_reaches_no_weight(updated, iteration, value):
    given = iteration.experience
    lines = [name for name in vars(given) if name.endswith("_BR") and name != "response_mask_BR"]
    filled = {name: torch.where(given.response_mask_BR, getattr(given, name), value) for name in lines}
    policy, critic, metrics = updated(dataclasses.replace(given, **filled))
    expected_policy, expected_critic, expected = updated()
    assert_same_weights(policy, expected_policy)
    assert_same_weights(critic, expected_critic)
    assert metrics == expected


def test_tokens_in_padding_reach_no_weight(updated, iteration):
    given = iteration.experience
    other = torch.where(given.mask_BT, given.tokens_BT, 7)
    assert_same_weights(updated(dataclasses.replace(given, tokens_BT=other))[0], updated()[0], atol=1e-5)


# --- minibatches ----------------------------------------------------------------------------------------------------


def drawn(count=12, seed=0, iteration=1, **settings):
    config = PPOConfig(batch_size=count, minibatch_size=4, epochs=3).model_copy(update=settings)
    return [index.tolist() for index in minibatches(count, config, seed, iteration)]


def test_every_epoch_sees_every_row_once_in_another_order():
    epochs = [[row for index in drawn()[start : start + 3] for row in index] for start in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_minibatches_belong_to_seed_and_iteration():
    assert drawn() == drawn()
    assert drawn(seed=1) != drawn()
    assert drawn(iteration=2) != drawn()


def test_answers_of_a_prompt_stay_together_and_prompts_are_shuffled():
    epochs = [[row for index in drawn(group_size=2)[start : start + 3] for row in index] for start in (0, 3, 6)]
    for epoch in epochs:
        assert [row % 2 for row in epoch] == [0, 1] * 6
        assert [row // 2 for row in epoch[::2]] == [row // 2 for row in epoch[1::2]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3

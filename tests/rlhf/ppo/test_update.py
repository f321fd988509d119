"""The update against a plain loop over unpadded rows, and what may not change it."""

import dataclasses
import math

import pytest
import torch

from rlhf.config import HardwareConfig, OptimConfig, PPOConfig
from rlhf.data.batches import select
from rlhf.distributed.engine import LocalEngine
from rlhf.models.policy import PolicyModel
from rlhf.ppo.update import minibatches, update

CLIP, VALUE_CLIP = 0.2, 0.1


@pytest.fixture
def updated(make_llama, make_scalar, iteration, ppo_config):
    """updated(…) → the policy and the critic after one update, and its figures."""

    def run(experience=iteration.experience, **settings):
        config = ppo_config.model_copy(update=settings)
        policy, critic = PolicyModel(make_llama(0), config.packing), make_scalar(2)
        critic.packing = config.packing
        metrics = update(
            LocalEngine(policy, config.optim, 4, HardwareConfig()),
            LocalEngine(critic, config.critic_optim, 4, HardwareConfig()),
            experience,
            config,
            key=(0, 1),
            kl_coef=0.1,
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


def row_losses(llama, critic, experience, i):
    """Loss sums of row i without padding, written as in the papers."""
    P = experience.tokens_BT.shape[1] - experience.response_mask_BR.shape[1]
    tokens = experience.tokens_BT[i][experience.mask_BT[i]]
    first, length = int(experience.mask_BT[i, :P].sum()), int(experience.response_mask_BR[i].sum())
    old, advantages, importance, old_values, returns = (
        getattr(experience, name)[i, :length]
        for name in ("old_logprobs_BR", "advantages_BR", "importance_BR", "old_values_BR", "returns_BR")
    )
    logits = llama(tokens[None]).logits[0, first - 1 : -1] / 0.7
    logprobs = torch.log_softmax(logits, -1)[range(length), tokens[first:]]
    ratio = (logprobs - old).exp()
    policy = importance * torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    values = critic(tokens[None], torch.ones_like(tokens[None]))[0, first - 1 : -1]
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return policy.sum(), 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).sum()


def test_two_steps_are_those_of_a_plain_loop(updated, make_llama, make_scalar, drifted):
    llama, critic = make_llama(0), make_scalar(2)
    count = drifted.response_mask_BR.sum()
    optimizers = [
        torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
            eps=1e-5,
        )
        for model in (llama, critic)
    ]
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

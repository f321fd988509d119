"""Where our PPO differs from TRL's on purpose: TRL's number from the same tensors, and beside it ours.

Each test has TRL's rule in its name.
"""

import torch

from rlhf.algorithms.advantages import gae
from rlhf.algorithms.kl import approx_kl, k1
from rlhf.algorithms.losses import value_loss
from rlhf.algorithms.masked import masked_mean_and_var, whiten
from tests.proofs.trl_golden import (
    SETTINGS,
    TOLERANCE,
    assert_near,
    assert_same_gradients,
    case,
    causal,
    in_rollout_order,
    our_token_rewards,
    trls_gradients,
    updated,
)

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

"""Bugs in the mathematics: rlhf/algorithms."""

from __future__ import annotations

from tests.mutants.bug import bugs_in

KL = bugs_in(
    "rlhf/algorithms/kl.py",
    ["rlhf/algorithms/test_kl.py"],
    (
        "k1 has the wrong sign",
        "return logprobs.float() - ref_logprobs.float()",
        "return ref_logprobs.float() - logprobs.float()",
    ),
    (
        "k1 is never negative",
        "return logprobs.float() - ref_logprobs.float()",
        "return (logprobs - ref_logprobs).abs()",
    ),
    (
        "k1 is computed in the precision of its inputs",
        "return logprobs.float() - ref_logprobs.float()",
        "return (logprobs - ref_logprobs).float()",
    ),
    (
        "k3 takes the ratio upside down",
        "log_ratio = ref_logprobs.float() - logprobs.float()",
        "log_ratio = logprobs.float() - ref_logprobs.float()",
    ),
    ("k3 adds the log-ratio", "torch.expm1(log_ratio) - log_ratio", "torch.expm1(log_ratio) + log_ratio"),
    ("k3 forgets the log-ratio", "torch.expm1(log_ratio) - log_ratio", "torch.expm1(log_ratio)"),
    ("approximate KL without its half", "return 0.5 * (new_logprobs", "return (new_logprobs"),
    ("approximate KL is not squared", "old_logprobs.float()) ** 2", "old_logprobs.float()).abs()"),
    ("β falls where the KL is too high", "kl / target - 1.0", "1.0 - kl / target"),
    ("the error of β is not clipped", "min(max(kl / target - 1.0, -0.2), 0.2)", "kl / target - 1.0"),
    ("the error of β is clipped above alone", "max(kl / target - 1.0, -0.2)", "kl / target - 1.0"),
    ("β ignores the number of answers", "error * min(n / horizon, 1.0)", "error"),
    ("a batch beyond the horizon moves β further", "min(n / horizon, 1.0)", "n / horizon"),
)

MASKED = bugs_in(
    "rlhf/algorithms/masked.py",
    ["rlhf/algorithms/test_masked.py"],
    ("masking multiplies, so NaN · 0 stays NaN", "torch.where(mask.bool(), x.float(), 0.0)", "x.float() * mask"),
    ("sums stay in the precision of their inputs", "x.float(), 0.0)", "x, 0.0)"),
    ("the mean is over padding too", "count = mask.bool().sum().clamp(min=1)", "count = mask.numel()"),
    ("the mean of nothing is NaN", "mask.bool().sum().clamp(min=1)", "mask.bool().sum()"),
    ("the variance is divided by n - 1", "** 2, mask) / count", "** 2, mask) / (count - 1).clamp(min=1)"),
    (
        "the variance of padding counts",
        "masked_sum((keep(x, mask) - mean) ** 2, mask)",
        "((keep(x, mask) - mean) ** 2).sum()",
    ),
    ("one token is whitened to NaN", "torch.where(var > SMALLEST_VARIANCE, var, 1.0).rsqrt()", "var.rsqrt()"),
    (
        "a tiny ε blows equal values up",
        "torch.where(var > SMALLEST_VARIANCE, var, 1.0).rsqrt()",
        "(var + 1e-8).rsqrt()",
    ),
    ("rounding errors count as a spread", "SMALLEST_VARIANCE = 1e-8", "SMALLEST_VARIANCE = 0.0"),
    ("whitening divides by the variance", ".rsqrt()", ".reciprocal()"),
    ("rewards are centred and advantages are not", "if shift_mean else", "if not shift_mean else"),
    ("whitening fills padding with the mean", "return keep(shifted * scale, mask)", "return shifted * scale"),
    ("the largest |x| is the largest x", "keep(x.detach(), mask).abs()", "keep(x.detach(), mask)"),
    ("the largest |x| is of padding too", "keep(x.detach(), mask).abs()", "x.detach().float().abs()"),
)

ADVANTAGES = bugs_in(
    "rlhf/algorithms/advantages.py",
    ["rlhf/algorithms/test_advantages.py"],
    ("γ is forgotten at the next value", "gamma * next_value_B", "next_value_B"),
    ("γ is forgotten at the next advantage", "gamma * gae_lambda *", "gae_lambda *"),
    ("λ is forgotten", "gamma * gae_lambda *", "gamma *"),
    ("λ discounts the next value too", "gamma * next_value_B", "gamma * gae_lambda * next_value_B"),
    ("the value of the state itself is not subtracted", "* next_value_B - values_BR[:, t]", "* next_value_B"),
    ("the next value is subtracted", "rewards_BR[:, t] + gamma", "rewards_BR[:, t] - gamma"),
    ("the reward is that of the token before", "rewards_BR[:, t] + gamma", "rewards_BR[:, t - 1] + gamma"),
    ("GAE runs from front to back", "reversed(range(values_BR.shape[1]))", "range(values_BR.shape[1])"),
    (
        "the last value is bootstrapped though the answer has ended",
        "next_value_B = next_advantage_B = values_BR.new_zeros(values_BR.shape[0])",
        "next_value_B, next_advantage_B = values_BR[:, -1], values_BR.new_zeros(values_BR.shape[0])",
    ),
    (
        "a masked gap gives its value to the token before it",
        "next_value_B = torch.where(mask_BR[:, t], values_BR[:, t], next_value_B)",
        "next_value_B = values_BR[:, t]",
    ),
    (
        "a masked gap ends the sum of advantages",
        "* next_advantage_B, next_advantage_B)",
        "* next_advantage_B, torch.zeros_like(delta_B))",
    ),
    (
        "what lies in masked slots counts",
        "= keep(rewards_BR, mask_BR), keep(values_BR, mask_BR)",
        "= rewards_BR, values_BR",
    ),
    ("padding has advantages", "    advantages_BR = keep(advantages_BR, mask_BR)\n", ""),
    (
        "returns lack the values",
        "return advantages_BR, advantages_BR + values_BR",
        "return advantages_BR, advantages_BR",
    ),
)

LOGPROBS = bugs_in(
    "rlhf/kernels/logprobs.py",
    ["rlhf/kernels/test_logprobs.py"],
    ("logits are multiplied by the temperature", "logits_GV.float() / temperature", "logits_GV.float() * temperature"),
    (
        "the temperature does not reach the chunks",
        "labels_BR.flatten(), temperature, chunk",
        "labels_BR.flatten(), 1.0, chunk",
    ),
    (
        "chunks stay in bfloat16",
        "return logits_GV.float() if temperature == 1.0 else logits_GV.float()",
        "return logits_GV",
    ),
    ("entropy carries a gradient", "ctx.mark_non_differentiable(entropy_N)", "pass"),
    ("the entropy of the chunks has the wrong sign", "entropy_C[rows] = -all", "entropy_C[rows] = all"),
    ("the gradient does not know the temperature", "gradient_C[:, None] / temperature", "gradient_C[:, None]"),
    ("the gradient is that of the logits alone", ".mul_(-gradient_C1[rows])", ".mul_(0.0)"),
    (
        "blocks of the gradient take each other's labels",
        "scatter_add_(1, labels_C[rows, None]",
        "scatter_add_(1, labels_C[: len(probs_GV), None]",
    ),
    ("labels are shifted by one", "weight_VH, labels_BR.flatten()", "weight_VH, labels_BR.flatten().roll(1)"),
    ("the weight gets the gradient of one chunk alone", "is_first=number == 0", "is_first=True"),
    ("the weight's gradient begins with what was there", "is_first=number == 0", "is_first=False"),
    (
        "kept logits are read as those of every chunk",
        "            ctx.last_CV = None  # from here on it is overwritten\n",
        "",
    ),
    ("two chunks have logits at once", "            del logits_CV, dlogits_CV  # before the next are made\n", ""),
    ("the logits of all positions exist at once", "range(0, len(labels_N), chunk)", "range(0, len(labels_N), 10**9)"),
)

LOSSES = bugs_in(
    "rlhf/algorithms/losses.py",
    ["rlhf/algorithms/test_losses.py"],
    ("the ratio is upside down", "(new_BR - old_BR).clamp(", "(old_BR - new_BR).clamp("),
    ("the ratio overflows", ".clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()", ".exp()"),
    (
        "good answers become less likely",
        "unclipped_BR = -advantages_BR * ratio_BR",
        "unclipped_BR = advantages_BR * ratio_BR",
    ),
    (
        "the larger objective is taken instead of the smaller",
        "* torch.maximum(unclipped_BR",
        "* torch.minimum(unclipped_BR",
    ),
    ("nothing is clipped", "importance_BR * torch.maximum(unclipped_BR, clipped_BR)", "importance_BR * unclipped_BR"),
    (
        "the clipped term alone counts",
        "importance_BR * torch.maximum(unclipped_BR, clipped_BR)",
        "importance_BR * clipped_BR",
    ),
    ("the ratio is clipped above alone", ".clamp(1 - clip_range, 1 + clip_range)", ".clamp(max=1 + clip_range)"),
    ("the clip is a log-ratio", ".clamp(1 - clip_range, 1 + clip_range)", ".clamp(-clip_range, clip_range)"),
    (
        "k1 is a loss",
        "sum=masked_sum(importance_BR * torch.maximum(unclipped_BR, clipped_BR), mask_BR)",
        "sum=masked_sum(importance_BR * torch.maximum(unclipped_BR, clipped_BR) + new_BR - old_BR, mask_BR)",
    ),
    (
        "the policy loss is summed over padding",
        "sum=masked_sum(importance_BR * torch.maximum(unclipped_BR, clipped_BR), mask_BR)",
        "sum=(importance_BR * torch.maximum(unclipped_BR, clipped_BR)).sum()",
        "advantages and weights are 0 in masked slots already",
    ),
    ("NaN in padding reaches the loss", "keep(values_BR, mask_BR)", "values_BR"),
    (
        "new logprobs of padding are kept",
        "keep(new_logprobs_BR, mask_BR)",
        "new_logprobs_BR",
        "the clamp of the log-ratio gives NaN no gradient, and the sum leaves padding out",
    ),
    ("advantages carry a gradient", "keep(advantages_BR.detach(), mask_BR)", "keep(advantages_BR, mask_BR)"),
    ("old logprobs carry a gradient", "keep(old_logprobs_BR.detach(), mask_BR)", "keep(old_logprobs_BR, mask_BR)"),
    ("importance weights carry a gradient", "keep(importance_BR.detach(), mask_BR)", "keep(importance_BR, mask_BR)"),
    ("importance weights are not used", "importance_BR * torch.maximum(", "torch.maximum("),
    ("importance weights have no bound", "ratio.clamp(max=cap)", "ratio"),
    ("importance weights are at least the cap", "ratio.clamp(max=cap)", "ratio.clamp(min=cap)"),
    (
        "importance weights are upside down",
        "(train_logprobs.detach().float() - behaviour_logprobs.float()).exp()",
        "(behaviour_logprobs.float() - train_logprobs.detach().float()).exp()",
    ),
    (
        "one importance weight for a whole answer",
        "- behaviour_logprobs.float()).exp()",
        "- behaviour_logprobs.float()).sum(-1, keepdim=True).exp().expand_as(mask)",
    ),
    ("the weight of the sampler learns", "(train_logprobs.detach().float()", "(train_logprobs.float()"),
    ("padding has importance weights", "return keep(ratio.clamp(max=cap), mask)", "return ratio.clamp(max=cap)"),
    (
        "the share of clipped tokens is that of the others",
        "clipped_sum=masked_sum(clipped_BR > unclipped_BR, mask_BR),\n        approx",
        "clipped_sum=masked_sum(clipped_BR < unclipped_BR, mask_BR),\n        approx",
    ),
    ("approximate KL carries a gradient", "approx_kl(new_BR.detach(), old_BR)", "approx_kl(new_BR, old_BR)"),
    (
        "the value error is clipped in the good direction",
        "0.5 * masked_sum(torch.maximum(",
        "0.5 * masked_sum(torch.minimum(",
    ),
    ("value loss without its half", "sum=0.5 * masked_sum(", "sum=masked_sum("),
    (
        "values are clipped around returns",
        "torch.clamp(values_BR, old_BR - clip_range, old_BR + clip_range)",
        "torch.clamp(values_BR, returns_BR - clip_range, returns_BR + clip_range)",
    ),
    (
        "value error to the old value",
        "unclipped_BR = (values_BR - returns_BR) ** 2",
        "unclipped_BR = (values_BR - old_BR) ** 2",
    ),
    ("returns carry a gradient", "keep(returns_BR.detach(), mask_BR)", "keep(returns_BR, mask_BR)"),
    ("old values carry a gradient", "keep(old_values_BR.detach(), mask_BR)", "keep(old_values_BR, mask_BR)"),
    ("the margin is added", "- margin_B.float()", "+ margin_B.float()"),
    ("the margin is ignored", " - margin_B.float()", ""),
    (
        "the rejected answer is preferred",
        "chosen_B.float() - rejected_B.float()",
        "rejected_B.float() - chosen_B.float()",
    ),
    ("scores are compared in bfloat16", "chosen_B.float() - rejected_B.float()", "(chosen_B - rejected_B).float()"),
    (
        "log(1 + exp(x)) overflows in the ranking loss",
        "-F.logsigmoid(gap_B).sum()",
        "torch.log(1 + torch.exp(-gap_B)).sum()",
    ),
    ("the ranking loss is a mean", "-F.logsigmoid(gap_B).sum()", "-F.logsigmoid(gap_B).mean()"),
    ("unsafe answers are pulled up", "(scores_B, is_safe_B, reduction", "(scores_B, 1 - is_safe_B, reduction"),
    ("answers of unknown safety count", "return masked_sum(losses_B, known_B)", "return losses_B.sum()"),
    ("padding counts as tokens", "return mask.bool().sum().float()", "return torch.ones_like(mask).sum().float()"),
)

REWARDS = bugs_in(
    "rlhf/algorithms/rewards.py",
    ["rlhf/algorithms/test_rewards.py"],
    ("the KL is a reward", "return -kl_coef * keep(", "return kl_coef * keep("),
    ("β is forgotten", "return -kl_coef * keep(", "return -keep("),
    ("the KL of padding counts", "-kl_coef * keep(kl_BR, mask_BR)", "-kl_coef * kl_BR"),
    ("the KL counts on the last token alone", "-kl_coef * keep(kl_BR, mask_BR)", "-kl_coef * keep(kl_BR, is_last_BR)"),
    (
        "the KL is missing on the last token",
        "-kl_coef * keep(kl_BR, mask_BR)",
        "-kl_coef * keep(kl_BR, mask_BR & ~is_last_BR)",
    ),
    ("the score counts at every token", "is_last_BR = mask_BR & (tokens_left_BR == 1)", "is_last_BR = mask_BR"),
    ("the score lies on the token before EOS", "(tokens_left_BR == 1)", "(tokens_left_BR == 2)"),
    (
        "the score lies on the first token",
        "mask_BR.long().flip(1).cumsum(1).flip(1)",
        "mask_BR.long().cumsum(1)",
    ),
    (
        "the score lies in the last column, padding or not",
        "is_last_BR = mask_BR & (tokens_left_BR == 1)",
        "is_last_BR = (tokens_left_BR * 0 + 1).cumsum(1) == mask_BR.shape[1]",
    ),
    (
        "the score lies on the slot after EOS",
        "is_last_BR = mask_BR & (tokens_left_BR == 1)",
        "is_last_BR = (mask_BR & (tokens_left_BR == 1)).roll(1, 1)",
    ),
    ("the score has the wrong sign", "+ keep(score_B", "- keep(score_B"),
    ("safe answers get the safety score", "| flagged_B.bool()", "| ~flagged_B.bool()"),
    ("the threshold stays a probability", "torch.logit(torch.tensor(threshold)).item()", "threshold"),
    (
        "safety counts only where the prompt is about it too",
        "is_safety_B.bool() | flagged",
        "is_safety_B.bool() & flagged",
    ),
    ("prompts about safety are ignored", "is_safety_B.bool() | flagged_B.bool()", "flagged_B.bool()"),
    (
        "helpfulness and safety are swapped",
        "safety_B.float(), helpful_B.float())",
        "helpful_B.float(), safety_B.float())",
    ),
    (
        "scores saturate on their way through a sigmoid",
        "torch.where(is_safety_B.bool() | flagged_B.bool(), safety_B.float(), helpful_B.float())",
        "torch.logit(torch.sigmoid(torch.where(is_safety_B.bool() | flagged_B.bool(), safety_B.float(), helpful_B.float())))",
    ),
    (
        "scores stay probabilities",
        "torch.where(is_safety_B.bool() | flagged_B.bool(), safety_B.float(), helpful_B.float())",
        "torch.sigmoid(torch.where(is_safety_B.bool() | flagged_B.bool(), safety_B.float(), helpful_B.float()))",
    ),
)

BUGS = [*KL, *MASKED, *ADVANTAGES, *LOGPROBS, *LOSSES, *REWARDS]

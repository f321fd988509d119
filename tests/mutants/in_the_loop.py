"""Bugs between sampling and the optimizer's step: what PPO does with the mathematics."""

from __future__ import annotations

from tests.mutants.bug import bugs_in

EXPERIENCE = bugs_in(
    "rlhf/ppo/experience.py",
    ["rlhf/ppo/test_experience.py"],
    (
        "the safety rule looks at the centred score",
        "flagged_unsafe(scores.safety_logit_B, ",
        "flagged_unsafe(scores.safety_B, ",
    ),
    (
        "helpfulness and safety are swapped",
        "(scores.helpful_B, scores.safety_B, is",
        "(scores.safety_B, scores.helpful_B, is",
    ),
    (
        "no prompt is about safety",
        "is_safety_B, flagged_B)\n    final_B",
        "is_safety_B & False, flagged_B)\n    final_B",
    ),
    ("rewards are centred by whitening", "shift_mean=False", "shift_mean=True"),
    ("rewards are whitened always", "if config.whiten_rewards:", "if True:"),
    ("the penalty for a missing EOS is a reward", "final_B - config.missing", "final_B + config.missing"),
    ("answers that end are penalised", "(~rollout.finished_B)", "rollout.finished_B"),
    (
        "the penalty is whitened with the scores",
        "(~rollout.finished_B).float()",
        "(~rollout.finished_B).float() / (score_B.std(correction=0) if config.whiten_rewards else 1)",
    ),
    (
        "the penalty replaces the score",
        "final_B = final_B - config.missing_eos_penalty * (~rollout.finished_B).float()",
        "final_B = torch.where(rollout.finished_B, final_B, -config.missing_eos_penalty)",
    ),
    ("k3 in the reward", "kl_BR = k1(", "kl_BR = k3("),
    (
        "the KL is to the sampler",
        "kl_BR = k1(scores.logprobs_BR, scores.ref_logprobs_BR)",
        "kl_BR = k1(scores.logprobs_BR, rollout.behaviour_logprobs_BR)",
    ),
    ("adaptive β is not used", "(final_B, kl_BR, kl_coef, mask_BR)", "(final_B, kl_BR, config.kl_coef, mask_BR)"),
    ("scores without penalty and whitening are trained on", "(final_B, kl_BR, kl_coef", "(score_B, kl_BR, kl_coef"),
    ("γ and λ are swapped", "config.gamma, config.gae_lambda)", "config.gae_lambda, config.gamma)"),
    (
        "values of padding are bootstrapped",
        "scores.values_BR, mask_BR, config",
        "scores.values_BR, mask_BR | True, config",
    ),
    (
        "advantages are whitened over padding",
        "masked_mean_and_var(advantages_BR, mask_BR)",
        "masked_mean_and_var(advantages_BR, mask_BR | True)",
    ),
    ("advantages are not whitened", "whiten(advantages_BR, mean, var, mask_BR, shift_mean=True)", "advantages_BR"),
    ("advantages are not centred", "mask_BR, shift_mean=True", "mask_BR, shift_mean=False"),
    (
        "returns are of whitened advantages",
        "returns_BR=returns_BR,",
        "returns_BR=whiten(advantages_BR, mean, var, mask_BR, shift_mean=True) + scores.values_BR,",
    ),
    ("old logprobs are the sampler's", "old_logprobs_BR=scores.logprobs", "old_logprobs_BR=rollout.behaviour_logprobs"),
    ("old logprobs are the reference's", "old_logprobs_BR=scores.logprobs", "old_logprobs_BR=scores.ref_logprobs"),
    ("values are clipped around returns", "old_values_BR=scores.values_BR", "old_values_BR=returns_BR"),
    (
        "importance weights are upside down",
        "scores.logprobs_BR, rollout.behaviour_logprobs_BR, config",
        "rollout.behaviour_logprobs_BR, scores.logprobs_BR, config",
    ),
    ("importance weights have no bound", "config.tis_cap, mask_BR", "1e9, mask_BR"),
    (
        "the reward told is whitened and penalised",
        "_figures(rollout, scores, score_B,",
        "_figures(rollout, scores, final_B,",
    ),
    ("the KL told is per token", "float(kl_B.mean())", "float(kl_B.sum() / mask_BR.sum())"),
    (
        "the KL told counts padding",
        "torch.where(mask_BR, k1(scores.logprobs_BR, scores.ref_logprobs_BR), 0.0)",
        "k1(scores.logprobs_BR, scores.ref_logprobs_BR)",
    ),
    ("the alarm for a drifting sampler looks at the mean", "gap_BR.abs().max()", "gap_BR.abs().mean()"),
    ("tokens count as cut whose weight is small", "(gap_BR > math.log(", "(gap_BR.abs() > math.log("),
    ("the alarm for a drifting sampler looks above alone", "gap_BR.abs().max()", "gap_BR.max()"),
    ("means over tokens count padding", "masked_mean_and_var(x_BR, mask_BR)[0]", "x_BR.mean()"),
    ("explained variance upside down", "1 - value_error / return_var", "1 - return_var / value_error"),
)

UPDATE = bugs_in(
    "rlhf/ppo/update.py",
    ["rlhf/ppo/test_update.py"],
    ("minibatches are the same in every epoch", "* 1_009 + epoch", "* 1_009"),
    ("minibatches do not know the seed", "(seed * 1_000_003 + iteration)", "iteration"),
    ("minibatches do not know the iteration", "(seed * 1_000_003 + iteration)", "seed"),
    (
        "rows are drawn with repetition",
        "torch.randperm(count // answers",
        "torch.randint(count // answers, (count // answers,)",
    ),
    (
        "answers of a prompt are shuffled apart",
        "row_B = (prompt_N[:, None] * answers + torch.arange(answers)).flatten()",
        "row_B = torch.randperm(count, generator=generator)",
    ),
    ("one epoch whatever was asked for", "for epoch in range(config.epochs)", "for epoch in range(1)"),
    ("the last minibatch is left out", ".split(config.minibatch_size)", ".split(config.minibatch_size)[:-1]"),
    ("losses are divided by rows", "float(experience.response_mask_BR[index].sum())", "float(len(index))"),
    (
        "losses are divided by slots",
        "float(experience.response_mask_BR[index].sum())",
        "float(experience.response_mask_BR[index].numel())",
    ),
    ("losses are divided by the tokens of all minibatches", "response_mask_BR[index].sum()", "response_mask_BR.sum()"),
    (
        "losses are means of means",
        "engine.backward(loss_sum(engine, part, config, means), count,",
        "engine.backward(loss_sum(engine, part, config, means), float(part.response_mask_BR.sum()) * len(passes),",
    ),
    (
        "the critic learns from the last pass alone",
        "_learn(critic, _value_loss, experience, passes,",
        "_learn(critic, _value_loss, experience, passes[-1:],",
    ),
    ("nobody steps", "return engine.step()", "return 0.0"),
    (
        "columns without tokens are read too",
        "trim(select(experience, mine))",
        "select(experience, mine)",
        "it only costs time",
    ),
    ("the update ignores the temperature", "config.sampling.temperature, with", "1.0, with"),
    ("old logprobs are those of now", "part.old_logprobs_BR,", "logprobs_BR.detach(),"),
    ("returns are taken for advantages", "part.advantages_BR,", "part.returns_BR,"),
    ("the policy's loss sees padding", "        part.response_mask_BR,\n", "        part.response_mask_BR | True,\n"),
    ("importance weights are not used", "part.importance_BR,", "torch.ones_like(part.importance_BR),"),
    ("the policy is clipped as values are", "config.clip_range,", "config.value_clip_range,"),
    ("values are clipped as the policy is", "config.value_clip_range)", "config.clip_range)"),
    ("values come from the position of their token", "[:, -R - 1 : -1]", "[:, -R:]"),
    (
        "the critic learns its own values",
        "part.old_values_BR, part.returns_BR",
        "part.old_values_BR, part.old_values_BR",
    ),
    (
        "old values and returns are swapped",
        "part.old_values_BR, part.returns_BR",
        "part.returns_BR, part.old_values_BR",
    ),
    (
        "the clip share told is a sum",
        'means.add("ppo/clip_fraction", loss.clipped_sum, loss.count)',
        'means.add("ppo/clip_fraction", loss.clipped_sum)',
    ),
)

PASSES = bugs_in(
    "rlhf/distributed/micro_batches.py",
    ["rlhf/distributed/test_micro_batches.py"],
    ("every rank reads the rows of the first", "index[order_NW[:, rank]]", "index[order_NW[:, 0]]"),
    ("rows are those of the minibatch and not of the iteration", "index[order_NW[:, rank]]", "order_NW[:, rank]"),
    ("a rank cuts passes by its own rows", "torch.tensor(of_ranks).transpose(0, 1)", "lengths_N3[order_N][:, None]"),
    (
        "passes are cut by the first rank's rows",
        "_pass_sizes(lengths_M3[order_NW], config)",
        "_pass_sizes(lengths_M3[order_NW[:, :1]], config)",
    ),
    ("a pass is one row over its limit", "starts.append(end - 1)", "starts.append(end)"),
    (
        "the limit on tokens is ignored",
        "limit = len(lengths_NW3), config.micro_batch_tokens",
        "limit = len(lengths_NW3), None",
    ),
    ("padded passes are counted as packed", "if packing:", "if not packing:"),
    ("the prompt's length is that of the whole row", "batch.mask_BT.sum(1) - response_B", "batch.mask_BT.sum(1)"),
    (
        "a pass is as wide as its shortest row",
        "(prompt_NW + response_NW).amax(0)",
        "(prompt_NW + response_NW).amin(0)",
    ),
    ("a shared prompt counts for every answer", "torch.where(repeats_NW, prompt_NW[1:], 0)", "0 * prompt_NW[1:]"),
    ("answers of a prompt go to several ranks", "config.group_size if config.packing else 1", "1"),
)

SCORING = bugs_in(
    "rlhf/ppo/scoring.py",
    ["rlhf/ppo/test_scoring.py"],
    ("values come from the position of their token", "[:, -R - 1 : -1]", "[:, -R:]"),
    ("rewards are not centred", " - offset_of(engine)", ""),
    ("scores come back in the order of passes", "[torch.cat(passes).argsort().to(parts[0].device)]", ""),
    (
        "the reference reads itself at another temperature",
        "reference(tokens_BT, mask_BT, R, temperature)",
        "reference(tokens_BT, mask_BT, R, 1.0)",
    ),
)

POLICY = bugs_in(
    "rlhf/models/policy.py",
    ["rlhf/ppo/test_scoring.py"],
    ("a token is predicted at its own position", "[:, -response_length - 1 : -1]", "[:, -response_length:]"),
    ("logprobs are of the token before", "tokens_BT[:, -response_length:]", "tokens_BT[:, -response_length - 1 : -1]"),
    ("the temperature is forgotten", "labels_N[None], temperature, with", "labels_N[None], 1.0, with"),
    (
        "the model does not see which slots are padding",
        "tokens_BT, mask_BT, self.packing, response_length)",
        "tokens_BT, mask_BT | True, self.packing, response_length)",
    ),
    (
        "padding has logprobs",
        "response_BR = mask_BT[:, -response_length:].bool()",
        "response_BR = mask_BT[:, -response_length:].bool() | True",
    ),
)

BATCHES = bugs_in(
    "rlhf/data/batches.py",
    ["rlhf/data/test_batches.py"],
    ("trimming cuts the last token", "slice(left, P + keep)", "slice(left, P + keep - 1)"),
    ("trimming cuts long prompts", "mask_BT[:, :P].sum(1).max()", "mask_BT[:, :P].sum(1).min()"),
    ("a prompt of padding is taken for one of tokens", ".masked_fill(~mask_BP, -1)", ""),
    ("trimming cuts long answers", "response_mask_BR.sum(1).max()", "response_mask_BR.sum(1).min()"),
)

METRICS = bugs_in(
    "rlhf/distributed/means.py",
    ["rlhf/distributed/test_means.py"],
    (
        "a mean of means",
        "Mean(float(part[0]), float(part[1]))",
        "Mean(float(part[0]) / max(float(part[1]), 1.0), float(part[1] > 0))",
    ),
    ("metrics keep the graph", "number.detach() if isinstance(number, Tensor) else number", "number"),
    ("every rank reports its own mean", "in _of_all_ranks(mine):", "in [mine]:"),
)

RANKS = bugs_in(
    "rlhf/distributed/collectives.py",
    ["rlhf/distributed/test_collectives.py"],
    (
        "every rank whitens its own rows",
        "if world_size() == 1:\n        return batch",
        "if world_size() >= 1:\n        return batch",
    ),
    ("the padding of a short rank counts as rows", "p[:n] for p, n", "p for p, n"),
    ("ranks share rows where they do not divide", "+ min(of_rank, extra)", ""),
    ("rows are lost where they do not divide", "-(-total // world_size())", "total // world_size()"),
    ("rows that went round again are told twice", "for value in part][:total]", "for value in part]"),
)

DRAW = bugs_in(
    "rlhf/data/loading.py",
    ["stages/test_ppo.py::test_a_prompt_has_its_answers_next_to_each_other_and_each_its_own_numbers"],
    ("answers of a prompt draw the same numbers", "* answers + answer_B % answers", "* answers"),
)

CHECKPOINT = bugs_in(
    "rlhf/runs/checkpoint.py",
    ["rlhf/runs/test_checkpoint.py"],
    ("β is lost on resume", "state | {", '{key: state[key] for key in state if key != "kl_coef"} | {'),
    ("the oldest checkpoint is taken", "return found[-1] if found", "return found[0] if found"),
    ("engines are not loaded", "        part.load(found / name)", "        pass"),
)

ENGINE = bugs_in(
    "rlhf/distributed/engine.py",
    [
        "rlhf/distributed/test_engine.py::test_the_cosine_by_hand",
        "rlhf/distributed/test_engine.py::test_an_engine_follows_its_schedule",
    ],
    ("the first step learns nothing", "(step + 1) / warmup", "step / warmup"),
    ("the schedule stands still", "        self.schedule.step()\n", ""),
    ("the cosine rises", "math.cos(math.pi * progress)", "math.cos(math.pi * (1 - progress))"),
)

OVERLAP = (
    bugs_in(
        "rlhf/ppo/rollout_source.py",
        ["rlhf/ppo/test_rollout_source.py"],
        ("scores come back in the order in which rows ended", "select(scores, order_B.argsort())", "scores"),
        ("rows are scored in the order of the batch's end", "order_B.argsort()", "order_B"),
        (
            "chunks are as large as what has just ended",
            "self._hand_over(count - count % self._size)",
            "self._hand_over(count)",
        ),
        (
            "answers sampled ahead are learned from twice",
            "taken, self.rollout = self.rollout, None",
            "taken = self.rollout",
        ),
    )
    + bugs_in(
        "rlhf/ppo/experience.py",
        ["stages/test_ahead.py"],
        (
            "answers sampled ahead are weighed as if they were not",
            "scores.logprobs_BR, rollout.behaviour_logprobs_BR, config",
            "scores.logprobs_BR, scores.logprobs_BR, config",
        ),
    )
    + bugs_in(
        "stages/ppo.py",
        ["stages/test_ahead.py"],
        ("answers sampled ahead are lost on resume", ', "ahead": models.ahead}', "}"),
    )
    + bugs_in(
        "rlhf/ppo/alarms.py",
        ["rlhf/ppo/test_alarms.py"],
        ("answers sampled ahead sound the alarm", '"mean" if metrics["ppo/staleness"] else "max"', '"max"'),
    )
)

CRITIC = [
    *bugs_in(
        "stages/ppo.py",
        ["stages/test_ppo.py::test_the_critic_starts_from_zero", "stages/test_ppo.py::test_lora_adapts_the_critic_too"],
        (
            "the critic starts as the raw reward model",
            "new_critic(scalar(ppo.helpfulness_model))",
            "scalar(ppo.helpfulness_model)",
        ),
        (
            "the critic is trained in full beside a policy with LoRA",
            'critic = add_lora(critic, config.model.lora, "scalar", config.seed)',
            "pass",
        ),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        ["rlhf/distributed/test_engine.py::test_what_lies_under_an_adapter_is_kept_in_bf16"],
        (
            "adapters are rounded to bf16 too",
            "(p for p in module.parameters() if not p.requires_grad)",
            "module.parameters()",
        ),
    ),
    *bugs_in(
        "rlhf/models/lora.py",
        ["rlhf/models/test_lora.py"],
        ("adapters are merged in bf16", "weight.float() + update", "(weight.float() + update).to(weight.dtype)"),
    ),
    *bugs_in(
        "rlhf/models/scalar.py",
        ["rlhf/models/test_scalar.py::test_a_new_critic_has_the_trunk_of_the_reward_model_and_no_value_yet"],
        ("the critic keeps the offset of its reward model", "    reward_model.offset = 0.0\n", ""),
    ),
]

PACKED = bugs_in(
    "stages/sft.py",
    ["stages/test_sft.py::test_a_model_whose_packed_rows_see_one_another_is_refused_before_the_first_step"],
    ("SFT packs what cannot be packed", 'check_packing(model, "sft.packing")', "pass"),
    ("PPO asks after two stages what can be packed", 'check_packing(model, "ppo.packing"', '(model, "ppo.packing"'),
)

BUGS = [
    *PACKED,
    *CRITIC,
    *EXPERIENCE,
    *UPDATE,
    *PASSES,
    *SCORING,
    *POLICY,
    *BATCHES,
    *METRICS,
    *RANKS,
    *DRAW,
    *CHECKPOINT,
    *ENGINE,
    *OVERLAP,
]

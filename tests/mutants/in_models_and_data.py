"""Bugs in what surrounds PPO: models and how they learn, random numbers, the chat format, data."""

from __future__ import annotations

from tests.mutants.bug import bugs_in

STEP = bugs_in(
    "rlhf/distributed/engine.py",
    [
        "rlhf/ppo/test_update.py::test_two_steps_are_those_of_a_plain_loop",
        "rlhf/distributed/test_engine.py::test_adam_by_hand",
    ],
    ("losses are sums", "(loss_sum / max(count, 1)).backward()", "loss_sum.backward()"),
    ("Adam has the eps of torch", ", eps=optim.eps, fused", ", fused"),
    ("Adam has the betas of torch", "betas=(optim.beta1, optim.beta2), ", ""),
)

ENGINE = bugs_in(
    "rlhf/distributed/engine.py",
    [
        "rlhf/distributed/test_engine.py::test_decay_pulls_on_matrices_alone",
        "rlhf/distributed/test_engine.py::test_the_norm_is_told_before_clipping_and_the_gradient_is_clipped",
        "rlhf/distributed/test_engine.py::test_a_step_over_no_tokens_is_finite",
        "rlhf/distributed/test_engine.py::test_gradients_do_not_outlive_their_step",
        "rlhf/distributed/test_engine.py::test_a_loaded_engine_makes_the_same_next_steps",
        "rlhf/distributed/test_engine.py::test_a_kept_state_does_not_change_with_the_module",
    ],
    (
        "norms and biases decay",
        'if len(s) < 2], "weight_decay": 0.0}',
        'if len(s) < 2], "weight_decay": optim.weight_decay}',
    ),
    (
        "gradients are not clipped",
        "clip_grad_norm_(trainable, self.max_grad_norm)",
        "clip_grad_norm_(trainable, math.inf)",
    ),
    (
        "a minibatch without tokens is divided by 0",
        "(loss_sum / max(count, 1)).backward()",
        "(loss_sum / count).backward()",
    ),
    ("gradients outlive their step", "        self.optimizer.zero_grad(set_to_none=True)\n", ""),
    ("the optimizer forgets its moments on resume", '        self.optimizer.load_state_dict(state["optimizer"])\n', ""),
    ("the schedule begins anew on resume", '        self.schedule.load_state_dict(state["schedule"])\n', ""),
    ("a weight view outlives its gather", 'tensor.to("cpu", copy=True)', 'tensor.to("cpu")'),
)

ZERO = bugs_in(
    "rlhf/distributed/engine.py",
    ["rlhf/distributed/test_engine.py::test_shards_are_gathered_bucket_by_bucket"],
    (
        "the whole model is gathered, as a shard has no elements",
        'getattr(parameter, "ds_numel", parameter.numel())',
        "parameter.numel()",
    ),
) + bugs_in(
    "rlhf/distributed/engine.py",
    ["rlhf/distributed/test_engine.py::test_two_ranks_under_zero_make_the_update_of_one_process"],
    ("gradients are averaged over ranks", "(self.world_size / max(count, 1))", "(1 / max(count, 1))"),
)

POSITIONS = bugs_in(
    "rlhf/models/pretrained.py",
    ["rlhf/generation/test_decoders.py::test_the_training_model_reads_the_same_logprobs"],
    (
        "padding stands before a row that is read",
        "device=mask_BT.device) < length_B[:, None]",
        "device=mask_BT.device) >= length_B.max() - length_B[:, None]",
    ),
    ("rows begin with the end of the row before", "= tokens_BT[mask_BT]", "= tokens_BT[mask_BT].roll(1)"),
    (
        "packed positions count padding",
        "position_BT = mask_BT.long().cumsum(1) - mask_BT.long()",
        "position_BT = torch.arange(mask_BT.shape[1]).expand_as(mask_BT)",
    ),
    ("packed positions begin at 1", "mask_BT.long().cumsum(1) - mask_BT.long()", "mask_BT.long().cumsum(1)"),
)

ATTENTION = bugs_in(
    "rlhf/kernels/attention.py",
    ["rlhf/kernels/test_attention.py"],
    ("a token sees the next one", ".triu(1)\n", ".triu(2)\n"),
    ("only the first block of keys is masked", "bias_QL[:, first:] =", "bias_QL[:, :Q] ="),
    ("the mean of weights' gradients stays in", "minus_mean_NX1, grad_NXD", "0 * minus_mean_NX1, grad_NXD"),
    ("gradients of keys forget the scale", "dk_NTD.mul_(ctx.scale)", "dk_NTD"),
    ("scores forget the scale", "alpha=scale", "alpha=1"),
    ("a block's keys get the gradient of one block alone", "dk_NTD[:, :L] +=", "dk_NTD[:, :L] ="),
    ("a mask is overlooked", "if ours and attention_mask is None and ", "if ours and "),
    ("packed rows forget the scale", "scale=scale, window_size", "scale=1.0, window_size"),
    ("packed rows see what follows", "window_size=(-1, 0)", "window_size=(-1, -1)"),
    ("packed rows are read without their windows", " and not has_windows(module.config)", ""),
    ("flash attention gets values of another size", " and value.shape == key.shape", ""),
    ("flash attention gets heads that it cannot read", " and D % 8 == 0", ""),
    ("packed rows are read in float32", ".to(torch.bfloat16).contiguous()", ".float().contiguous()"),
) + bugs_in(
    "rlhf/models/pretrained.py",
    ["rlhf/kernels/test_attention.py"],
    ("packed rows are told as one", "length_B.cumsum(0), (1, 0)", "length_B.sum()[None], (1, 0)"),
    (
        "the first packed row is told as the longest",
        "longest, ends = int(length_B.max())",
        "longest, ends = int(length_B[0])",
    ),
    ("masks that say more are not read", "    if not follows_row_ends(model):\n", "    if False:\n"),
)

NORM = bugs_in(
    "rlhf/kernels/norm.py",
    ["rlhf/kernels/test_norm.py"],
    ("the gradient forgets that the scale depends on the input", ".sub_(x_hat_NH.mul_(mean_N1))", ""),
    ("the weight's gradient is that of its input", "product_NH = dy_NH * x_hat_NH", "product_NH = dy_NH * x_NH"),
    ("heads read a rounded norm", "and name.endswith(OF_LAYERS)", ""),
)

PRETRAINED = bugs_in(
    "rlhf/models/pretrained.py",
    ["rlhf/models/test_pretrained.py"],
    ("states of padding are taken", ".last_hidden_state[real_BW]", ".last_hidden_state.flip(1)[real_BW]"),
    ("packed rows see one another", "position_BT[packed.read_BT][None]", "torch.arange(int(mask_BT.sum()))[None]"),
    ("dropout stays on", "setattr(part, key, 0.0)", "setattr(part, key, value)"),
    ("pad is EOS", "not in (None, tokenizer.eos_token_id):", "is not None:"),
    ("pad is taken from EOS and BOS", "taken = (tokenizer.eos_token, tokenizer.bos_token)", "taken = ()"),
    (
        "the embedding of EOS is padding to the model",
        "text.pad_token_id = pad if pad < text.vocab_size else None",
        "pass",
    ),
    ("missing weights are made up", "    if missing:\n", "    if False:\n"),
    (
        "given weights are not saved",
        "dict(model.state_dict() if state_dict is None else state_dict)",
        "dict(model.state_dict())",
    ),
)

PACKING = bugs_in(
    "rlhf/models/packing.py",
    ["rlhf/models/test_packing.py"],
    ("answers of a prompt see one another", "[:, None] == prompt_N", "[:, None] == first_B[row_N]"),
    ("answers do not see a prompt that they share", "    sees_NN |= first_B[row_N][:, None] == prompt_N\n", ""),
    ("packed answers see what follows", "    sees_NN &= column_N[:, None] >= column_N\n", ""),
    ("the state before an answer is not that of its prompt", "place_BT[:, :P] = place_BT[first_B, :P]", "pass"),
) + bugs_in(
    "rlhf/models/pretrained.py",
    ["rlhf/models/test_packing.py"],
    (
        "an answer begins at position 0 where its prompt was read for another",
        "position_BT[packed.read_BT][None]",
        "(packed.read_BT.long().cumsum(1) - 1)[packed.read_BT][None]",
    ),
    ("windows of attention are lost by sharing", " and not has_windows(config)", ""),
)

SCALAR = bugs_in(
    "rlhf/models/scalar.py",
    ["rlhf/models/test_scalar.py"],
    ("the score is read behind left padding", "(positions_T * mask_BT.long()).argmax(1)", "mask_BT.long().sum(1) - 1"),
    ("the score is read in the last column", "values_BT.gather(1, last_B[:, None])[:, 0]", "values_BT[:, -1]"),
    (
        "the score is read one token early",
        "values_BT.gather(1, last_B[:, None])",
        "values_BT.gather(1, last_B[:, None] - 1)",
    ),
    (
        "the head is bfloat16 in autocast",
        "hidden_BTH.device.type, enabled=False",
        "hidden_BTH.device.type, enabled=torch.is_autocast_enabled('cpu')",
    ),
    (
        "the head is rounded with its backbone",
        "ScalarModel(classifier.base_model, head_1H, getattr",
        "ScalarModel(classifier.base_model, classifier.score.weight, getattr",
    ),
    ("the score is not centred", "mask_BT), mask_BT) - self.offset", "mask_BT), mask_BT)"),
    ("the offset is added", "mask_BT), mask_BT) - self.offset", "mask_BT), mask_BT) + self.offset"),
    ("the offset is not saved", "config.reward_offset = float(offset)", "config.reward_offset = 0.0"),
    ("the head is not saved", '| {"score.weight": head_1H}', ""),
    ("the head is saved as it began", 'head_1H = state.pop("head.weight")', 'head_1H = state.pop("head.weight") * 0'),
    (
        "a missing head is made up",
        'raise UserError(f"{folder} says that it is a reward model, and has no score.weight", 4)',
        "return torch.zeros(1, 32)",
        "a folder without it is refused already where all its weights are read",
    ),
    (
        "a new head is random",
        "ScalarModel(causal.base_model, torch.zeros(1,",
        "ScalarModel(causal.base_model, torch.randn(1,",
    ),
)

KEYED = bugs_in(
    "rlhf/generation/counter_rng.py",
    [
        "rlhf/generation/test_counter_rng.py::test_keyed_numbers_are_those_of_whole_number_arithmetic",
        "rlhf/generation/test_counter_rng.py::test_tokens_follow_the_softmax",
        "rlhf/generation/test_counter_rng.py::test_a_picked_token_is_where_the_cumulative_distribution_passes_the_number",
        "rlhf/generation/test_counter_rng.py::test_what_rounding_leaves_falls_to_no_impossible_token",
        "rlhf/generation/test_counter_rng.py::test_every_place_in_a_large_vocabulary_is_found",
    ],
    ("sampling is greedy", "return index_B1[:, 0].clamp(max=V - 1)", "return probs_BV.argmax(-1)"),
    (
        "unlikely tokens are never sampled (top-p)",
        "    V = probs_BV.shape[1]\n",
        "    V, probs_BV = probs_BV.shape[1], probs_BV.where(probs_BV > 0.05, 0.0)\n",
    ),
    ("logits are flattened", "    V = probs_BV.shape[1]\n", "    V, probs_BV = probs_BV.shape[1], probs_BV.sqrt()\n"),
    ("tokens of probability 0 are sampled at 0", "right=True", "right=False"),
    ("the last token gets what rounding leaves", "target_B1.minimum(below_last_B1)", "target_B1"),
    ("tokens before the block are not counted", "target_B1 - before_B1", "target_B1"),
    ("the last block is left out", "if V % BLOCK else []", "if V < BLOCK else []"),
    (
        "every position draws the same number",
        "for key in (iteration, ids_B, *keys)",
        "for key in (iteration, ids_B)",
    ),
    (
        "every prompt draws the same number",
        "for key in (iteration, ids_B, *keys)",
        "for key in (iteration, *keys)",
    ),
    (
        "every iteration draws the same number",
        "for key in (iteration, ids_B, *keys)",
        "for key in (ids_B, *keys)",
    ),
    ("every seed draws the same number", "torch.full_like(ids_B, seed)", "torch.zeros_like(ids_B)"),
    (
        "keys are added up",
        "x_B = _mix(x_B ^ key)",
        "x_B = _mix(torch.full_like(ids_B, seed) + iteration + ids_B + sum(keys))",
    ),
    ("negative hashes shift in ones", "(x >> bits) & ((1 << (64 - bits)) - 1)", "x >> bits"),
    ("a number may be 1", "* 2.0**-24", "/ (2.0**24 - 1)"),
)

SAMPLER = (
    bugs_in(
        "rlhf/generation/in_process.py",
        ["rlhf/generation/test_decoders.py", "rlhf/generation/test_in_process.py"],
        ("the sampler ignores the temperature", ".div_(self.temperature)", ""),
        (
            "all tokens of an answer draw the same number",
            "self.prompts.ids_B[index_G], t_G)",
            "self.prompts.ids_B[index_G], 0)",
        ),
        ("a number belongs to a row, not to a prompt", "self.prompts.ids_B[index_G], t_G)", "index_G, t_G)"),
        ("a prompt is read for each of its answers", "_is_as_before(self.prompt_B[index_G])", "_is_as_before(index_G)"),
        ("answers begin as those of the first prompt", "logits_DV[source_G]", "logits_DV[source_G * 0]"),
        ("copies are of the rows that came first", "slot + source_G[D:]", "source_G[D:]"),
        ("rows stay when they have ended", "(self.token_S != self.eos_id) & ", ""),
    )
    + bugs_in(
        "rlhf/generation/kv_cache.py",
        ["rlhf/generation/test_kv_cache.py"],
        (
            "a row sees a column of its predecessor",
            "self.start_S[: self.rows, None]",
            "self.start_S[: self.rows, None] - 1",
        ),
        ("a row that moves keeps its old mask", "self.start_S[: self.rows] = self.start_S[from_S]", "pass"),
        ("a copied row lacks what its source has read", "x[newcomers, :, columns] = x[slot_F, :, columns]", "pass"),
        ("a copied row has the mask of its predecessor", "self.start_S[newcomers] = self.start_S[slot_F]", "pass"),
        ("positions are one too far", "self.end - 1 - self.start_S", "self.end - self.start_S"),
        ("a row sees columns that are not yet written", " & (column_C < self.end)", ""),
        ("long rows that have gone keep their room", " or self.columns > 2 * self._with_spare(self.used)", ""),
        (
            "a row that moves leaves its last token",
            "x[slot, :, start : self.end] = x[source, :, start : self.end]",
            "x[slot, :, start : self.end - 1] = x[source, :, start : self.end - 1]",
        ),
    )
    + bugs_in(
        "rlhf/generation/kv_cache.py",
        ["rlhf/generation/test_cuda_graph.py"],
        ("keys and values wait for the garbage collection", "weakref.proxy(cache)", "cache"),
    )
    + bugs_in(
        "rlhf/generation/cuda_graph.py",
        ["rlhf/generation/test_cuda_graph.py"],
        (
            "a graph outlives the cache that it was recorded for",
            "if self.cache.moves != self.moves:",
            "if self.moves < 0:",
        ),
        (
            "rows that are gone see nothing",
            "bias_SC[:N].masked_fill_",
            "bias_SC[N:] = -torch.inf; bias_SC[:N].masked_fill_",
        ),
        ("a graph has fewer rows than the cache", "-(-rows // part) * part", "max(rows // part, 1) * part"),
    )
    + bugs_in(
        "rlhf/generation/llama.py",
        ["rlhf/generation/test_decoders.py"],
        ("prompts see what follows", "is_causal=True", "is_causal=False"),
        ("positions turn the wrong way", "[-sin_NF, sin_NF]", "[sin_NF, -sin_NF]"),
        (
            "key heads go to the wrong query heads",
            "q_SAD.unflatten(1, (self.K, -1))\n            return _attention(q_SKQD, layer.keys[rows]",
            "q_SAD.unflatten(1, (-1, self.K)).transpose(1, 2)\n            return _attention(q_SKQD, layer.keys[rows]",
        ),
        ("a row sees what its slot held before", 'float("-inf")', "0.0"),
        ("the first logits are of another row", "length_G.cumsum(0) - 1", "length_G.cumsum(0) - length_G"),
        (
            "a scaled rotation is taken for a plain one",
            'and (config.rope_parameters or {}).get("rope_type") == "default"',
            "",
        ),
    )
)

CHAT = bugs_in(
    "rlhf/chat/llama2.py",
    ["rlhf/chat/test_llama2.py"],
    ("prompt and answer merge at their seam", "if ids[: len(prompt_ids)] != prompt_ids:", "if False:"),
    ("an answer has no EOS", "[*bos, *ids, tokenizer.eos_token_id]", "[*bos, *ids]"),
    (
        "the first answer token is not learned",
        "return [*bos, *ids, tokenizer.eos_token_id], answer_start",
        "return [*bos, *ids, tokenizer.eos_token_id], answer_start + 1",
    ),
    ("the last prompt token is learned", "answer_start = len(bos) + len(prompt_ids)", "answer_start = len(prompt_ids)"),
    ("EOS is not learned", "[1] * (len(turn_ids) - answer_start)", "[1] * (len(turn_ids) - answer_start - 1) + [0]"),
    ("prompts are learned", "[0] * answer_start", "[1] * answer_start"),
    ("a written special token ends the turn", "split_special_tokens=True", "split_special_tokens=False"),
    ("BOS stands twice", "add_special_tokens=False", "add_special_tokens=True"),
    ("only the answer is stripped", "{B_INST} {turn.user.strip()} {E_INST}", "{B_INST} {turn.user} {E_INST}"),
    ("an answer is read beyond its EOS", "    if tokenizer.eos_token_id in ids:\n", "    if False:\n"),
    (
        "the system text replaces the first question",
        "[B_SYS + texts[0] + E_SYS + texts[1]]",
        "[B_SYS + texts[0] + E_SYS]",
    ),
)

DATA = bugs_in(
    "rlhf/data/loading.py",
    ["rlhf/data/test_loading.py"],
    (
        "choice prompts are the first of the file",
        "for _, _, prompt in sorted(places):",
        "for _, _, prompt in places:",
    ),
    ("the draw is blind to tags", "min((row.tag, row.source", "min((row.source, row.source"),
    ("the draw follows no seed", 'f"{seed}/{prompt}"', 'f"{prompt}"'),
    (
        "what a role holds out others train on",
        "for other in (name for name in held_out if name != role):",
        "for other in ():",
    ),
    (
        "margins fall with the rating",
        '"large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0',
        '"large": {"significantly": 1.0, "better": 2.0, "slightly": 3.0',
    ),
    ("margins are those of another table", "MARGINS[margin][row.rating]", 'MARGINS["small"][row.rating]'),
    ("chosen and rejected are swapped", "row.prompt, row.chosen)", "row.prompt, row.rejected)"),
    ("both sides have the safety of the chosen one", "SAFETY[row.rejected_safety]", "SAFETY[row.chosen_safety]"),
    ("unknown safety is unsafe", '"unknown": -1}', '"unknown": 0}'),
    (
        "pairs that prefer a safe answer are left out",
        'chosen_safety == "unsafe" and row.rejected_safety == "safe"',
        'chosen_safety == "safe" and row.rejected_safety == "unsafe"',
    ),
    ("prompts are padded on the right", "if left else", "if not left else"),
    ("masks compare with the pad id", "mask_BT[row, place] = True", "mask_BT[row] = tokens_BT[row] != pad_id"),
    ("long rows are kept", "if length(row) <= max_length]", "if True]"),
    (
        "helpful prompts are about safety",
        'row.tag == "safety" for row in prompts',
        'row.tag == "helpful" for row in prompts',
    ),
    (
        "every answer of a prompt has the same key",
        "torch.tensor(ids, dtype=torch.long)",
        "torch.zeros(len(ids), dtype=torch.long)",
    ),
    (
        "prompts that are held out are trained on",
        "    return kept, shared\n",
        "    return train, shared\n",
    ),
    (
        "the prompts that chose the policy report it too",
        "return draw_rows(prompts, for_choice, seed)",
        "return draw_rows(prompts, for_choice, seed)[0], [*prompts]",
    ),
)

HH = bugs_in(
    "reward_data/converters/hh.py",
    ["reward_data/test_hh.py"],
    (
        "an HH prompt ends where the two texts begin to differ",
        """
        if prompt != other:""",
        """
        import os

        both = row.value["chosen"], row.value["rejected"]
        prompt = other = os.path.commonprefix(both)
        chosen, rejected = (side.removeprefix(prompt) for side in both)
        if prompt != other:""",
    ),
    (
        "an HH prompt ends at its first assistant turn",
        "transcript.rpartition(ASSISTANT)",
        "transcript.partition(ASSISTANT)",
    ),
)

VLLM = bugs_in(
    "rlhf/generation/vllm.py",
    [
        "rlhf/generation/test_vllm.py::test_every_weight_is_handed_over_and_outlives_its_turn",
        "rlhf/generation/test_vllm.py::test_on_a_gpu_the_engine_sleeps_but_while_it_loads_and_samples",
        "rlhf/generation/test_vllm.py::test_what_a_taker_of_rows_raises_ends_the_other_rows_and_puts_the_engine_to_sleep",
    ],
    ("a weight view outlives its turn", "tensor.to(self.dtype, copy=True)", "tensor.to(self.dtype)"),
    (
        "weights are not loaded",
        'self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": copies()})',
        "list(copies())",
    ),
    (
        "a head that is the table keeps its old weights",
        "for target in (name, *self.tied.get(name, ())):",
        "for target in (name,):",
    ),
    (
        "the engine never sleeps",
        "        if self.sleeps:\n            self.llm.sleep(level=1)",
        "        if False:\n            self.llm.sleep(level=1)",
    ),
    ("weights are loaded into memory that is gone", 'self._wake("weights")', "self._wake()"),
    ("rows that nobody takes stay in the engine", "(length_B == 0).nonzero()", "(length_B < 0).nonzero()"),
)

BUGS = [
    *STEP,
    *ENGINE,
    *ZERO,
    *POSITIONS,
    *ATTENTION,
    *NORM,
    *PRETRAINED,
    *PACKING,
    *SCALAR,
    *KEYED,
    *SAMPLER,
    *VLLM,
    *CHAT,
    *DATA,
    *HH,
]

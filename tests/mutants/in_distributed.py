"""Bugs in what ranks share and how they step: rlhf/distributed."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/distributed/micro_batches.py",
        ["rlhf/ppo/test_scoring.py"],
        Bug("scores come back in the order of micro-batches", "in_row_order", "A[_.to(_)]", "A"),
    ),
    *bugs_in(
        "rlhf/distributed/collectives.py",
        ["rlhf/distributed/test_collectives.py"],
        Bug("every rank whitens its own rows", "gather_rows", "_ == 1", "world_size() >= 1"),
        Bug("the padding of a short rank counts as rows", "_gather", "A[_]", "A", nth=2),
        Bug("ranks share rows where they do not divide", "shard", "A + min(...)", "A"),
        Bug("rows are lost where they do not divide", "even_shard", "-(-A // _)", "A // world_size()"),
        Bug("rows that went round again are told twice", "join_shards", "A[:_]", "A"),
    ),
    *bugs_in(
        "rlhf/distributed/sequence.py",
        ["rlhf/distributed/test_sequence.py"],
        Bug("gradients go back as values came", "_Exchange.backward", "_exchange(A, B, C, D)", "_exchange(A, B, D, C)"),
        Bug("a slice's gradient counts once", "_SumOfSlices.backward", "A * B", "A"),
        Bug("a rank takes the rows of the first of its group", "rows_of_group", "A.rank * B", "0", nth=0),
        Bug("every group is the first", "_group", "A if B == C else D", "A if B == 0 else D"),
    ),
    *bugs_in(
        "rlhf/distributed/collectives.py",
        ["rlhf/distributed/test_sequence.py"],
        Bug("ranks of a group read other rows", "data_rank", "A // B", "A % B"),
        Bug("ranks of a group have rows of their own", "even_shard", "data_rank(A)", "data_rank(1)"),
        Bug("rows of a group are told twice", "join_shards", "A[::B]", "A"),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        ["proofs/test_layout.py"],
        Bug("a group's loss counts for each of its ranks", "ZeroEngine.__init__", "A.data_ranks(B)", "A.data_ranks(1)"),
    ),
    *bugs_in(
        "stages/trl_trainer.py",
        ["stages/test_sequence_parallel.py"],
        Bug("ranks of a group train on other rows", "for_groups", "range(B)", "range(1)", given="range(A, A + _)"),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        ["rlhf/distributed/test_engine.py::test_what_lies_under_an_adapter_is_kept_in_bf16"],
        Bug("adapters are rounded to bf16 too", "with_frozen_weights", "(_ for _ in A if _)", "A"),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        [
            "rlhf/distributed/test_engine.py::test_the_cosine_by_hand",
            "rlhf/distributed/test_engine.py::test_an_engine_follows_its_schedule",
        ],
        Bug("the first step learns nothing", "learning_rate_fraction", "A + 1", "A"),
        Bug("the schedule stands still", "LocalEngine.step", "self.schedule.step()", ""),
        Bug("the cosine rises", "learning_rate_fraction", "math.pi * A", "math.pi * (1 - A)"),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        [
            "rlhf/ppo/test_update.py::test_two_steps_are_those_of_a_plain_loop",
            "rlhf/distributed/test_engine.py::test_adam_by_hand",
        ],
        Bug("losses are sums", "LocalEngine.backward", "A / _", "A"),
        Bug(
            "Adam has the eps of torch",
            "build_optimizer",
            "_.AdamW(A, lr=B, betas=C, eps=_, fused=True)",
            "torch.optim.AdamW(A, lr=B, betas=C, fused=True)",
        ),
        Bug(
            "Adam has the betas of torch",
            "build_optimizer",
            "_.AdamW(A, lr=B, betas=_, eps=C, fused=True)",
            "torch.optim.AdamW(A, lr=B, eps=C, fused=True)",
        ),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        [
            "rlhf/distributed/test_engine.py::test_decay_pulls_on_matrices_alone",
            "rlhf/distributed/test_engine.py::test_the_norm_is_told_before_clipping_and_the_gradient_is_clipped",
            "rlhf/distributed/test_engine.py::test_a_step_over_no_tokens_is_finite",
            "rlhf/distributed/test_engine.py::test_gradients_do_not_outlive_their_step",
            "rlhf/distributed/test_engine.py::test_a_loaded_engine_makes_the_same_next_steps",
        ],
        Bug(
            "norms and biases decay",
            "build_optimizer",
            "{'params': A, 'weight_decay': 0.0}",
            "{'params': A, 'weight_decay': B.weight_decay}",
            given="B.lr",
        ),
        Bug("gradients are not clipped", "LocalEngine.step", "self.max_grad_norm", "math.inf"),
        Bug("a minibatch without tokens is divided by 0", "LocalEngine.backward", "max(A, 1)", "A"),
        Bug("gradients outlive their step", "LocalEngine.step", "_.zero_grad(set_to_none=True)", ""),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        ["rlhf/distributed/test_zero.py::test_shards_are_gathered_bucket_by_bucket"],
        Bug("the whole model is gathered, as a shard has no elements", "_buckets", "getattr(_, 'ds_numel', A)", "A"),
    ),
    *bugs_in(
        "rlhf/distributed/engine.py",
        ["rlhf/distributed/test_zero.py::test_two_ranks_under_zero_make_the_update_of_one_process"],
        Bug("gradients are averaged over ranks", "ZeroEngine.backward", "_ / A", "1 / A"),
    ),
    *bugs_in(
        "rlhf/distributed/training_state.py",
        [
            "rlhf/distributed/test_engine.py::test_a_loaded_engine_makes_the_same_next_steps",
            "rlhf/distributed/test_training_state.py::test_one_process_goes_on",
        ],
        Bug("the optimizer forgets its moments on resume", "_make_states", "if step == 0: ...", "if True: ..."),
        Bug("the schedule begins anew on resume", "load", "A.load_state_dict(_)", ""),
        Bug("the bias correction of Adam begins anew on resume", "_make_states", "float(A)", "1.0"),
        Bug("a buffer is not loaded", "load", "_.copy_(_)", ""),
        Bug("every rank's fragment is put at the start", "_fill", "begin - one.start", "0"),
        Bug("the first elements of every file are taken", "_fill", "begin - first", "0"),
        Bug("padding counts as elements", "_fragments", "min(_, _)", "padded"),
    ),
    *bugs_in(
        "rlhf/distributed/means.py",
        ["rlhf/distributed/test_means.py"],
        Bug("a mean of means", "_read", "Mean(A, B)", "Mean(A / max(B, 1.0), float(C[1] > 0))", given="C[0]"),
        Bug("metrics keep the graph", "_detached", "_ if _ else A", "A"),
        Bug("every rank reports its own mean", "Means.reduce", "_of_all_ranks(A)", "[A]"),
    ),
    *bugs_in(
        "rlhf/distributed/micro_batches.py",
        ["rlhf/distributed/test_micro_batches.py"],
        Bug("every rank reads the rows of the first", "micro_batches_of_minibatch", "A[_, _]", "A[:, 0]"),
        Bug(
            "rows are those of the minibatch and not of the iteration",
            "micro_batches_of_minibatch",
            "_[A].split",
            "A.split",
        ),
        Bug(
            "a rank cuts passes by its own rows",
            "micro_batches_of_shards",
            "_.transpose(0, 1)",
            "A[B][:, None]",
            given="A[B].tolist",
        ),
        Bug("passes are cut by the first rank's rows", "micro_batches_of_minibatch", "A[B]", "A[B[:, :1]]", nth=3),
        Bug("a pass is one row over its limit", "_pass_sizes", "A - 1", "A"),
        Bug("the limit on tokens is ignored", "_pass_sizes", "A = (B, _)", "A = (B, None)"),
        Bug("padded passes are counted as packed", "_tokens_W", "if A: ...", "if not A: ..."),
        Bug("the prompt's length is that of the whole row", "_lengths", "[A - B, B, C]", "[A, B, C]"),
        Bug("a pass is as wide as its shortest row", "_tokens_W", "A.amax", "A.amin"),
        Bug("a shared prompt counts for every answer", "_tokens_W", "torch.where(_, A, 0).sum(0)", "0 * A.sum(0)"),
        Bug("answers of a prompt go to several ranks", "_dealt", "A = _", "A = 1"),
    ),
]

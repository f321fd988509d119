"""Bugs in the models: rlhf/models."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/models/lora.py",
        ["rlhf/models/test_lora.py"],
        Bug("adapters are merged in bf16", "merged", "A + B", "(A + B).to(C.dtype)", given="C = _[_]"),
    ),
    *bugs_in(
        "rlhf/models/packing.py",
        ["rlhf/models/test_packing.py"],
        Bug("answers of a prompt see one another", "_sees", "A == B", "A == C[D]", given="C[D][_] == B"),
        Bug("answers do not see a prompt that they share", "_sees", "_ |= _", ""),
        Bug("packed answers see what follows", "_sees", "_ &= _", ""),
        Bug("the state before an answer is not that of its prompt", "pack", "_ = _[_]", ""),
    ),
    *bugs_in(
        "rlhf/models/policy.py",
        ["rlhf/ppo/test_scoring.py"],
        Bug("a token is predicted at its own position", "PolicyModel.forward", "A[_, B - 1:_]", "A[:, B:]"),
        Bug("logprobs are of the token before", "PolicyModel.forward", "A[_, B:][C]", "A[:, B - 1:-1][C]"),
        Bug(
            "the temperature is forgotten",
            "PolicyModel.forward",
            "logprobs_and_entropy_from_hidden(A, B, C, _, with_entropy=D)",
            "logprobs_and_entropy_from_hidden(A, B, C, 1.0, with_entropy=D)",
        ),
        Bug(
            "the model does not see which slots are padding",
            "PolicyModel.forward",
            "hidden_states(A, B, C, ...)",
            "hidden_states(A, B, C | True, ...)",
        ),
        Bug("padding has logprobs", "PolicyModel.forward", "A.bool()", "A.bool() | True"),
    ),
    *bugs_in(
        "rlhf/models/pretrained.py",
        ["rlhf/generation/test_decoders.py::test_the_training_model_reads_the_same_logprobs"],
        Bug("padding stands before a row that is read", "hidden_states", "A < B", "A >= C.max() - B", given="C.max"),
        Bug(
            "rows begin with the end of the row before",
            "hidden_states",
            "A[D] = B[C]",
            "A[D] = B[C].roll(1)",
        ),
        Bug("packed positions count padding", "hidden_states", "_ - A.long()", "torch.arange(A.shape[1]).expand_as(A)"),
        Bug("packed positions begin at 1", "hidden_states", "A - _", "A"),
    ),
    *bugs_in(
        "rlhf/models/pretrained.py",
        ["rlhf/kernels/test_attention.py"],
        Bug("packed rows are told as one", "_row_ends", "A.cumsum(0)", "A.sum()[None]"),
        Bug("the first packed row is told as the longest", "_row_ends", "A.max()", "A[0]"),
        Bug("masks that say more are not read", "_row_ends", "not _", "False"),
    ),
    *bugs_in(
        "rlhf/models/pretrained.py",
        ["rlhf/models/test_pretrained.py"],
        Bug("states of padding are taken", "hidden_states", "A = B[C]", "A = B.flip(1)[C]", nth=1),
        Bug(
            "packed rows see one another",
            "hidden_states",
            "A[_]",
            "torch.arange(int(B.sum()))",
            given="A = _ - B.long()",
        ),
        Bug("dropout stays on", "load_config", "setattr(A, B, 0.0)", "setattr(A, B, C)", given="isinstance(C, float)"),
        Bug("pad is EOS", "_separate_pad_from_eos", "A not in (None, _)", "A is not None"),
        Bug("pad is taken from EOS and BOS", "_separate_pad_from_eos", "A = (_, _)", "A = ()"),
        Bug("the embedding of EOS is padding to the model", "load_config", "_.pad_token_id = _", ""),
        Bug("missing weights are made up", "load_complete", "if _: raise A", "if False: raise A"),
        Bug("given weights are not saved", "save_causal", "A if _ else _", "A"),
    ),
    *bugs_in(
        "rlhf/models/pretrained.py",
        ["rlhf/models/test_packing.py"],
        Bug(
            "an answer begins at position 0 where its prompt was read for another",
            "hidden_states",
            "A[B]",
            "(B.long().cumsum(1) - 1)[B]",
            given="A = _ - _",
        ),
        Bug("windows of attention are lost by sharing", "can_share_prompts", "A and _", "A"),
    ),
    *bugs_in(
        "rlhf/models/scalar.py",
        ["rlhf/models/test_scalar.py::test_a_new_critic_has_the_trunk_of_the_reward_model_and_no_value_yet"],
        Bug("the critic keeps the offset of its reward model", "new_critic", "_.offset = 0.0", ""),
    ),
    *bugs_in(
        "rlhf/models/scalar.py",
        ["rlhf/models/test_scalar.py"],
        Bug("the score is read behind left padding", "last_value", "(_ * A).argmax(1)", "A.sum(1) - 1"),
        Bug("the score is read in the last column", "last_value", "A.gather(1, _)[_]", "A[:, -1]"),
        Bug("the score is read one token early", "last_value", "A[_, None]", "A[:, None] - 1"),
        Bug(
            "the head is bfloat16 in autocast",
            "Float32Head.forward",
            "torch.autocast(..., enabled=False)",
            "torch.autocast(..., enabled=torch.is_autocast_enabled('cpu'))",
        ),
        Bug(
            "the head is rounded with its backbone",
            "load_scalar",
            "ScalarModel(A, _, B)",
            "ScalarModel(A, C.score.weight, B)",
            given="ScalarModel(C.base_model, _, _)",
        ),
        Bug("the score is not centred", "ScalarModel.score", "A - _", "A"),
        Bug("the offset is added", "ScalarModel.score", "A - B", "A + B"),
        Bug("the offset is not saved", "_empty_classifier", "float(_)", "0.0"),
        Bug("the head is not saved", "ScalarModel.save", "A = B | _", "A = B"),
        Bug("the head is saved as it began", "ScalarModel.save", "A = B", "A = B * 0", nth=2),
        Bug(
            "a missing head is made up",
            "_read_head",
            "raise _",
            "return torch.zeros(1, 32)",
            nth=0,
            harmless="a folder without it is refused already where all its weights are read",
        ),
        Bug("a new head is random", "load_scalar", "torch.zeros", "torch.randn"),
    ),
]

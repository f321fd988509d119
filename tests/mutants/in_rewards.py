"""Bugs in what a response is worth: rlhf/rewards, and the code that a user names: rlhf/user_code.py."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/rewards/combine.py",
        ["rlhf/rewards/test_combine.py"],
        Bug("a reward that is only watched fails the row", "weighted_sum.combine", "A[_, B].any", "A.any"),
        Bug("a reward that is only watched makes the sum NaN", "weighted_sum.combine", "A[_, B] @ C[B]", "A @ C"),
        Bug("weights are not used", "weighted_sum.combine", "A[_, B] @ C[B]", "A[:, B].sum(1)"),
        Bug("a sum with a failed reward is a score", "weighted_sum.combine", "A[_, B].any(1)", "A[:, B].all(1)"),
        Bug("a sum that failed is what is left of it", "weighted_sum.combine", "torch.where(_, 0.0, A)", "A"),
        Bug("the raw logit of safety is not restored", "piecewise.combine", "A + _", "A"),
        Bug(
            "the helpful score counts for safety",
            "piecewise.combine",
            "piecewise_reward(A, B, ...)",
            "piecewise_reward(B, A, ...)",
        ),
        Bug(
            "no prompt is about safety",
            "piecewise.combine",
            "piecewise_reward(A, B, C, D)",
            "piecewise_reward(A, B, C & False, D)",
        ),
        Bug("only a failed helpful score fails", "piecewise.combine", "A.any(1)", "A[:, 0]"),
        Bug("a rule that failed is what is left of it", "piecewise.combine", "torch.where(_, 0.0, A)", "A"),
        Bug("flagged is told of all prompts", "_safety_metrics", "A[_].float()", "A.float()"),
        Bug("the safety branch is told without what is flagged", "_safety_metrics", "A | _", "A"),
        Bug(
            "columns of rewards are turned round",
            "RewardSet.__call__",
            "[_.values_B for _ in A]",
            "[s.values_B for s in A[::-1]]",
        ),
    ),
    *bugs_in(
        "rlhf/rewards/function.py",
        ["rlhf/rewards/test_function.py"],
        Bug("a score that failed is a zero", "FunctionReward.__call__", "[A is None for A in B]", "[False for A in B]"),
        Bug("NaN is a score", "FunctionReward._number", "math.isfinite(A) and _", "abs(A) < 1e299 or A != A"),
        Bug(
            "a score that float32 cannot hold is infinite",
            "FunctionReward._number",
            "math.isfinite(A) and _",
            "math.isfinite(A)",
        ),
        Bug("too few scores are scores", "FunctionReward._as_list", "len(A) != B", "False"),
        Bug("tensors are no scores", "FunctionReward._as_list", "A.tolist() if _ else A", "A"),
        Bug("nobody stops waiting for a function", "FunctionReward._in_time", "A.join(_)", "A.join()"),
        Bug("what a function raised is lost", "FunctionReward._in_time", "if A is not None: ...", ""),
        Bug("every function is given everything", "FunctionReward._arguments", "A if _ else _", "A"),
        Bug("two stars take nothing more", "FunctionReward._arguments", "_ if _ else A", "A"),
        Bug("defaults give way to None", "FunctionReward._arguments", "{*A._required}", "{*A._named}"),
        Bug("a column takes the place of the responses", "FunctionReward._arguments", "A - {*OWN}", "A"),
        Bug("the prompt is the first message", "FunctionReward._arguments", "A.messages[-1]", "A.messages[0]"),
        Bug("columns are asked for that everyone is given", "FunctionReward.check_columns", "A - {*OWN} - B", "A - B"),
        Bug("columns that no row has are not missed", "FunctionReward.check_columns", "A - {*OWN} - B", "set()"),
        Bug("arguments by position are called by name", "_parameters", "A.kind is A.POSITIONAL_ONLY", "False"),
        Bug("a function without names is called", "_parameters", "all(...)", "False"),
    ),
    *bugs_in(
        "rlhf/rewards/model.py",
        ["rlhf/ppo/test_scoring.py"],
        Bug("rewards are not centred", "score", "A - _", "A"),
        Bug(
            "rewards come back in the order of micro-batches",
            "ModelReward.__call__",
            "in_row_order(A, _)",
            "torch.cat(A)",
        ),
    ),
    *bugs_in(
        "rlhf/user_code.py",
        ["rlhf/test_user_code.py"],
        Bug("a file is run for each of its names", "_module_of_file", "A in sys.modules", "False"),
        Bug("files of one name are one module", "_module_of_file", "str(A.absolute())", "A.name"),
        Bug("a module that failed is kept half made", "_module_of_file", "del A[B]", ""),
        Bug("dataclasses do not find their module", "_module_of_file", "A = sys.modules[B] = C", "A = C"),
        Bug("an object that is not there is None", "load_object", "not hasattr(...)", "False"),
        Bug("code that changed has the digest it had", "source_digest", "Path(A).read_bytes()", "A.encode()"),
    ),
]

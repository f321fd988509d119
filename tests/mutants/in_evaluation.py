"""Bugs in what reward models and policies are worth: rlhf/evaluation, launch/evaluate."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "rlhf/evaluation/statistics.py",
        ["rlhf/evaluation/test_coverage.py", "rlhf/evaluation/test_statistics.py"],
        Bug("clusters are not drawn as a whole", "bootstrap", "sums_by_cluster(A, _)", "A"),
        Bug("few clusters have the interval of many", "expanded_percentiles", "A = float(_)", "A = 0.025"),
        Bug("a clustered share takes outcomes for independent", "proportion", "A = min(_, B.size)", "A = B.size"),
        Bug("a share may be surer than with independent outcomes", "proportion", "min(A, B.size)", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/calibration.py",
        ["rlhf/evaluation/test_calibration.py"],
        Bug("the calibration error is signed", "error_of", "np.abs(A).sum(-1)", "A.sum(-1)"),
        Bug(
            "the interval of the calibration error knows no noise", "_error_with", "np.abs(A * B + C)", "np.abs(A * B)"
        ),
        Bug("the temperature is its inverse", "fitted_temperature", "estimate(1 / A, ...)", "estimate(A, ...)", nth=1),
        Bug("the interval of the temperature knows no clusters", "fitted_temperature", "sums_by_cluster(A, _)", "A"),
        Bug("Brier's score is of wins alone", "calibration", "(1 - A) ** 2", "(1 - A)"),
    ),
    *bugs_in(
        "rlhf/evaluation/length_bias.py",
        ["rlhf/evaluation/test_length_bias.py"],
        Bug("pairs of equal length count as preferences", "length_bias", "A != 0.5", "A != 2"),
        Bug("shorter is where lengths are equal too", "length_bias", "A == 0", "A <= 0.5"),
        Bug("the partial correlation is the plain one", "_partial", "(A - B * C) / _", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/reward_accuracy.py",
        ["rlhf/evaluation/test_length_bias.py"],
        Bug("a tie is a win", "wins", "0.5", "1.0"),
        Bug("the shorter floor is the longer one", "floors", "1 - A", "A"),
        Bug("turns beyond the last group are lost", "accuracy", "np.minimum(A, _)", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/judge.py",
        ["rlhf/evaluation/test_judge.py"],
        Bug("the second order is read like the first", "judge_preference", "1 - WORTH[A]", "WORTH[A]"),
        Bug("the first order alone decides", "judge_preference", "np.where(A, B, 0.5)", "B"),
        Bug("ties count for the position", "judge_preference", "A != 'C'", "A != 'D'"),
        Bug("one of several verdicts is taken", "verdict", "len(A) == 1", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/agreement.py",
        ["rlhf/evaluation/test_agreement.py"],
        Bug("McNemar counts all pairs", "agreement", "binomtest(A, A + B)", "binomtest(A, len(a_N))"),
        Bug("margins are not ranked", "agreement", "rankdata(A)", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/ranked_lists.py",
        ["rlhf/evaluation/test_agreement.py"],
        Bug("lists without an order count", "ranked_lists", "not np.ptp(A) or not np.ptp(B)", "not np.ptp(A)"),
        Bug("the worst response is looked for", "ranked_lists", "A == A.max()", "A == A.min()", nth=0),
    ),
    *bugs_in(
        "rlhf/evaluation/reward_bench.py",
        ["rlhf/evaluation/test_reward_bench.py"],
        Bug("a shared best score counts whole", "credit", "A / len(B)", "float(A > 0)"),
        Bug("sections weigh subsets alike", "reward_bench", "A * B[C].value", "B[C].value * 100"),
        Bug("any right response above the wrong ones is enough", "_spread", "min(A) - max(B)", "max(A) - max(B)"),
        Bug("the harder half of Ties is the easier one", "ties_score", "np.minimum(A, _)", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/items.py",
        ["rlhf/evaluation/test_items.py"],
        Bug("prompts differ by case", "Item.prompt_digest", "normalised_prompt(A)", "repr(A)"),
        Bug("lists with too few scores are read", "_group", "len(A) != len(B) or len(B) < 2", "len(B) < 2"),
    ),
    *bugs_in(
        "rlhf/evaluation/preference.py",
        ["rlhf/evaluation/test_preference.py"],
        Bug(
            "a tie is a win of the first", "preference", "np.where(A == B, 0.5, A > B)", "np.where(A == B, 1.0, A > B)"
        ),
        Bug("the interval knows no clusters", "length_controlled", "sums_by_cluster(A, _)", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/best_of_n.py",
        ["rlhf/evaluation/test_samples.py"],
        Bug("the best of n is that of n + 1", "weights_of_best", "comb(A, n - 1)", "comb(A, n)"),
        Bug("equal scores do not share", "weights_of_best", "(A / B)[C]", "A[C]"),
    ),
    *bugs_in(
        "rlhf/evaluation/comparison.py",
        ["launch/test_compare.py", "rlhf/evaluation/test_comparison.py"],
        Bug("items in common are enough to pair runs", "not_paired", "A != B", "not A & B"),
        Bug(
            "a difference by item is of b and a",
            "difference_by_item",
            "paired_difference(A, B, C)",
            "paired_difference(B, A, C)",
        ),
        Bug(
            "a difference by item knows no clusters",
            "difference_by_item",
            "paired_difference(A, B, C)",
            "paired_difference(A, B)",
        ),
        Bug("a difference by seed is of b and a", "difference_by_seed", "A[B] - C[B]", "C[B] - A[B]"),
        Bug("seeds are told without a second one", "over_seeds", "len(A) > 1", "A"),
    ),
    *bugs_in(
        "rlhf/evaluation/held_out.py",
        ["rlhf/evaluation/test_held_out.py"],
        Bug("a text that stands twice is one item", "rows_of", "f'{A[B]} {B}'", "B"),
        Bug("what was not measured is kept", "rows_of", "A[B] is not None", "True"),
    ),
    *bugs_in(
        "rlhf/evaluation/over_optimization.py",
        ["rlhf/evaluation/test_over_optimization.py"],
        Bug("all prompts choose", "over_optimization", "A[B] % 2 == 0", "True"),
        Bug("a flat proxy is enough", "over_optimization", "A.low > 0", "A.high > 0"),
    ),
    *bugs_in(
        "launch/evaluate/windows.py",
        ["launch/test_evaluate_reward.py", "launch/test_policy_resume.py"],
        Bug("half a window is kept after a kill", "WindowFile.__init__", "stream.truncate(A)", ""),
        Bug("scores of other data are gone on with", "WindowFile.__init__", "not A and B != C", "False"),
    ),
    *bugs_in(
        "launch/evaluate/scores.py",
        ["launch/test_evaluate_reward.py"],
        Bug("windows are scored again", "ScoreFile.fill", "A.windows.get(B, 0)", "0", nth=0),
    ),
    *bugs_in(
        "launch/evaluate/policy/sampling.py",
        ["launch/test_policy_resume.py"],
        Bug("windows are sampled again", "_fill", "A.windows.get(B, 0)", "0"),
        Bug("every window has the random numbers of the first", "_fill", "range(A, A + len(B))", "range(len(B))"),
    ),
    *bugs_in(
        "launch/evaluate/metrics.py",
        ["launch/test_evaluate_reward.py"],
        Bug("the best pairs are shown as the worst", "worst_rows", "np.argsort(A, kind=_)", "np.argsort(-A)"),
    ),
]

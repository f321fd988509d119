"""Bugs in how speed is measured: benchmarks."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

BUGS = [
    *bugs_in(
        "benchmarks/bare.py",
        ["benchmarks/test_bare.py"],
        Bug("sides that compute something else are compared", "check_losses", "_ > _", "False"),
        Bug("the first step is timed", "turn", "pairwise(A)", "pairwise([0.0, *A])"),
        Bug("padding counts as tokens", "compare", "_.tokens(A)", "A['input_ids'].numel()"),
    ),
    *bugs_in(
        "benchmarks/scaling.py",
        ["benchmarks/test_scaling.py"],
        Bug("exponents are fitted the wrong way round", "exponent", "(A, B)", "(B, A)"),
        Bug("growth is not fitted in logarithms", "exponent", "math.log(A)", "float(A)"),
        Bug(
            "the growth by length is told for rows",
            "summary",
            "exponent(FACTORS, A)",
            "exponent(FACTORS, B)",
            given="A, B = _",
        ),
    ),
    *bugs_in(
        "benchmarks/sync.py",
        ["benchmarks/test_sync.py"],
        Bug("ours and the naive sync are swapped", "summary", "A / B", "B / A", nth=0),
    ),
]

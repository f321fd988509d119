"""Bugs in how speed is measured."""

from __future__ import annotations

from tests.mutants.bug import bugs_in

BARE = bugs_in(
    "benchmarks/bare.py",
    ["benchmarks/test_bare.py"],
    ("sides that compute something else are compared", "    if worst > tolerance:", "    if False:"),
    ("the first step is timed", "pairwise(marks)", "pairwise([0.0, *marks])"),
    ("padding counts as tokens", "tokens = sum(stage.tokens(batch)", 'tokens = sum(batch["input_ids"].numel()'),
)

SCALING = bugs_in(
    "benchmarks/scaling.py",
    ["benchmarks/test_scaling.py"],
    ("exponents are fitted the wrong way round", "for series in (sizes, values)", "for series in (values, sizes)"),
    (
        "growth is not fitted in logarithms",
        "[math.log(value) for value in series]",
        "[float(value) for value in series]",
    ),
    (
        "the growth by length is told for rows",
        '"exponent_rows": exponent(FACTORS, by_rows)',
        '"exponent_rows": exponent(FACTORS, by_length)',
    ),
)

SYNC = bugs_in(
    "benchmarks/sync.py",
    ["benchmarks/test_sync.py"],
    ("ours and the naive sync are swapped", 'seconds["naive"] / seconds["ours"]', 'seconds["ours"] / seconds["naive"]'),
)

BUGS = [*BARE, *SCALING, *SYNC]

"""Bugs in what is decided before and around a run: launch/doctor, launch/elastic."""

from __future__ import annotations

from tests.mutants.bug import Bug, bugs_in

TESTS = ["launch/test_doctor.py"]

BUGS = [
    *bugs_in(
        "launch/doctor/nodes.py",
        TESTS,
        Bug("a clock is judged by what may be the call's delay", "clocks", "abs(A) - B > SMALL_SKEW_S", "abs(A) > SMALL_SKEW_S"),
        Bug("a clock that is behind is right", "clocks", "abs(A) - B > SMALL_SKEW_S", "A - B > SMALL_SKEW_S"),
        Bug("most nodes lack the model, so it is not missing", "odd_ones", "A in B or not C", "True"),
        Bug("a full disk is none", "disks", "A.disk_bytes < B", "A.disk_bytes < 0"),
    ),
    *bugs_in(
        "launch/doctor/room.py",
        TESTS,
        Bug("a worker may lie on two nodes", "places", "int(A)", "A"),
        Bug("the resource of which there is most decides", "places", "min(A)", "max(A)"),
    ),
    *bugs_in(
        "launch/doctor/network.py",
        TESTS,
        Bug("a pair meets in every round", "rounds", "[A[0], A[-1], *A[1:-1]]", "A"),
        Bug("a slow pair is good", "is_slow", "A > SLOW_ROUND_S or B", "A > SLOW_ROUND_S and B"),
    ),
    *bugs_in(
        "launch/doctor/storage.py",
        TESTS,
        Bug("an old text is the new one", "read", "A in B and C == D", "A in B"),
    ),
    *bugs_in(
        "launch/elastic.py",
        ["launch/test_elastic.py"],
        Bug("as few workers as may be go on", "sized", "range(A, B - 1, -1)", "range(B, A + 1)"),
        Bug("micro-batches stay too large for fewer workers", "with_workers", "A.with_fitting_micro_batches()", "A"),
    ),
]  # fmt: skip

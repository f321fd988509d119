"""The runner tells a bug that is found from one that is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.mutants.bug import ROOT

pytestmark = pytest.mark.proof

PROGRAM = """
import dataclasses
from tests.mutants.run import chosen, main

killed = chosen(["kl.py: k1 has", "masked.py: masking", "rewards.py: the KL is a", "losses.py: the policy loss is summed"])
print("exit", main(killed))
kl = killed[0]
others = {
    "nothing": ("return A", "return A + 0.0"),
    "no program": ("return _", "return logprobz"),
    "too good": (kl.pattern, kl.planted),
}
others = [dataclasses.replace(kl, name=name, pattern=old, planted=new) for name, (old, new) in others.items()]
others[-1] = dataclasses.replace(others[-1], harmless="it is said to change nothing")
print("exit", main(others))
endless = dataclasses.replace(kl, name="endless", pattern="return _", planted="while True: pass")
print("exit", main([endless], limit=3))
print("exit", main([dataclasses.replace(kl, where="no_such_function")]))
"""


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """What four runs print: of bugs that tests find, of others, of one without end, of a table that does not fit."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("exit ")


def test_bugs_are_killed_by_the_tests_that_are_named(shown: list[str]) -> None:
    assert shown[1].startswith("0\n")
    assert "3 of 3 bugs killed (100.0 %), 1 harmless changes" in shown[0]
    assert "k1 has the wrong sign" in shown[0] and "test_kl.py test_k1_and_k3_by_hand" in shown[0]


def test_what_is_not_found_is_told_and_ends_with_1(shown: list[str]) -> None:
    assert shown[2].startswith("1\n") and shown[3].startswith("1\n")
    assert "0 of 2 bugs killed" in shown[1] and "0 of 1 bugs killed" in shown[2]
    told = [line for text in shown[1:3] for line in text.splitlines() if line.startswith("rlhf/algorithms/kl.py: ")]
    assert told == [
        "rlhf/algorithms/kl.py: nothing: no test fails",
        "rlhf/algorithms/kl.py: no program: NameError in tests/rlhf/algorithms/test_kl.py::test_k1_and_k3_by_hand",
        "rlhf/algorithms/kl.py: too good: called harmless, and test_kl.py::test_k1_and_k3_by_hand fails",
        "rlhf/algorithms/kl.py: endless: no end in 3 s",
    ]


def test_a_place_that_is_not_there_stops_the_runner(shown: list[str]) -> None:
    assert shown[4].startswith("1\n")
    assert "k1 has the wrong sign: 0 functions or classes, not one, are called no_such_function" in shown[3]

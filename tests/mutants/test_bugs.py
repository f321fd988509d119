"""The tables fit the program, and the runner tells a bug that is found from one that is not."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.bug import Bug
from tests.mutants.bugs import BUGS

ROOT = Path(__file__).parents[2]


def texts_not_found_once(bugs: list[Bug]) -> list[str]:
    sources = {file: (ROOT / file).read_text(encoding="utf-8") for file in {bug.file for bug in bugs}}
    counts = [(bug, sources[bug.file].count(bug.text)) for bug in bugs]
    return [f"{bug.file}: {bug.name}: {count} times" for bug, count in counts if count != 1]


def missing_tests(bugs: list[Bug]) -> list[str]:
    missing = []
    for test in {test for bug in bugs for test in bug.tests}:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8")) if (ROOT / file).is_file() else ast.Module([], [])
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
        if not names or (name and name not in names):
            missing.append(test)
    return missing


def test_every_planted_text_is_found_exactly_once() -> None:
    assert texts_not_found_once(BUGS) == []


def test_every_named_test_exists() -> None:
    assert missing_tests(BUGS) == []


def test_every_bug_is_another_one() -> None:
    assert [
        where for where, count in Counter((bug.file, bug.planted, bug.text) for bug in BUGS).items() if count > 1
    ] == []
    assert [where for where, count in Counter((bug.file, bug.name) for bug in BUGS).items() if count > 1] == []
    assert [bug.name for bug in BUGS if bug.planted == bug.text] == []


def test_a_table_that_no_longer_fits_is_found() -> None:
    bug = BUGS[0]
    assert len(texts_not_found_once([dataclasses.replace(bug, text="no such text")])) == 1
    assert len(texts_not_found_once([dataclasses.replace(bug, text="return")])) == 1
    for test in ("tests/no_such_file.py", bug.tests[0] + "::test_no_such_test"):
        assert missing_tests([dataclasses.replace(bug, tests=(test,))]) == [test]


def rows_of_the_page(heading: str) -> list[list[str]]:
    """The table with this first row in docs/correctness.md."""
    page = (ROOT / "docs/correctness.md").read_text(encoding="utf-8").splitlines()
    start = page.index(heading) + 2
    end = next(number for number in range(start, len(page)) if not page[number].startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page[start:end]]


def test_the_page_names_bugs_that_are_planted_and_all_harmless_changes() -> None:
    planted = {bug.name for bug in BUGS if not bug.harmless}
    named = {name for _, _, names in rows_of_the_page("| bug | seen in | planted as |") for name in names.split("; ")}
    assert named - planted == set()
    harmless = rows_of_the_page("| change | why it changes nothing |")
    assert harmless == [[f"`{bug.file}`: {bug.name}", bug.harmless] for bug in BUGS if bug.harmless]


# --- the runner -----------------------------------------------------------------------------------------------------

PROGRAM = """
import dataclasses
from tests.mutants.run import chosen, main

killed = chosen(["kl.py: k1 has", "masked.py: masking", "rewards.py: the KL is a", "losses.py: the policy loss is summed"])
print("exit", main(killed))
kl = killed[0]
others = {
    "nothing": kl.text + "  # the same",
    "no program": "return logprobz",
    "too good": kl.planted,
}
others = [dataclasses.replace(kl, name=name, planted=text) for name, text in others.items()]
others[-1] = dataclasses.replace(others[-1], harmless="it is said to change nothing")
print("exit", main(others))
print("exit", main([dataclasses.replace(kl, name="endless", planted="while True: pass")], limit=3))
print("exit", main([dataclasses.replace(kl, text="no such text")]))
"""


@pytest.fixture(scope="module")
def shown() -> list[str]:
    """What four runs print: of bugs that tests find, of others, of one without end, of a table that does not fit."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("exit ")


@pytest.mark.integration
def test_bugs_are_killed_by_the_tests_that_are_named(shown: list[str]) -> None:
    assert shown[1].startswith("0\n")
    assert "3 of 3 bugs killed (100.0 %), 1 harmless changes" in shown[0]
    assert "k1 has the wrong sign" in shown[0] and "test_kl.py test_k1_and_k3_by_hand" in shown[0]


@pytest.mark.integration
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


@pytest.mark.integration
def test_a_text_that_is_not_there_stops_the_runner(shown: list[str]) -> None:
    assert shown[4].startswith("1\n")
    assert "has the text 0 times, not once" in shown[3]

"""A table that does not fit the program, the tests or the page is told before anything runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants.bug import Bug, bugs_in
from tests.mutants.check import misfits, wrong_on_the_page

(BUG,) = bugs_in("pkg/a.py", ["test_a.py::test_f"], Bug("f adds", "f", "A - B", "A + B"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "pkg/a.py").write_text("def f(x, y):\n    return x - y\n")
    (tmp_path / "tests/test_a.py").write_text("def test_f():\n    assert True\n")
    return tmp_path


def test_a_table_that_fits(root: Path) -> None:
    assert misfits([BUG], root) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"where": "g"}, "pkg/a.py: f adds: 0 functions or classes, not one, are called g"),
        ({"pattern": "A * B"}, "pkg/a.py: f adds: f has 0 pieces like `A * B`, not one"),
        (
            {"pattern": "return _", "planted": "continue"},
            "pkg/a.py: f adds: 'continue' not properly in loop (a.py, line 2)",
        ),
        ({"file": "pkg/b.py"}, "pkg/b.py: f adds: there is no such file"),
        ({"tests": ("tests/test_a.py::test_g",)}, "tests/test_a.py::test_g: there is no such test"),
        ({"tests": ("tests/test_b.py",)}, "tests/test_b.py: there is no such test"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(root: Path, change: dict, told: str) -> None:
    assert misfits([replace(BUG, **change)], root) == [told]


def test_one_bug_under_two_names_is_told(root: Path) -> None:
    twin = replace(BUG, name="the second", pattern="return A - B", planted="return A + B")
    assert misfits([BUG, twin], root) == ["pkg/a.py: the second: the same program as: f adds"]


PAGE = """
| bug | seen in | planted as |
|---|---|---|
| a sign | a paper | f adds |

| change | why it changes nothing |
|---|---|
| `pkg/a.py`: slow | it costs time |

"""


def test_the_page_names_what_is_planted_and_all_that_is_harmless() -> None:
    slow = replace(BUG, name="slow", harmless="it costs time")
    assert wrong_on_the_page([BUG, slow], PAGE) == []
    assert wrong_on_the_page([replace(BUG, name="other"), slow], PAGE) == ["docs/correctness.md: nobody plants: f adds"]
    assert len(wrong_on_the_page([BUG], PAGE)) == 1

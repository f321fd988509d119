"""A piece of a program is found by its shape and replaced, and what is no longer there is told."""

from __future__ import annotations

import ast

import pytest

from tests.mutants.pattern import CannotPlant, replace

PROGRAM = """
EPS = 1e-8

class Sampler:
    size = 4

    def draw(self, logits, scale):
        \"\"\"Draws.\"\"\"
        gap = logits.float() - scale.float()
        if self.size > 2 and gap:
            self.run.clear(now=True)
        for row in reversed(range(3)):
            gap = keep(gap, row, eps=EPS, shift=False)
        return gap

def draw(logits):
    return logits - 1
"""


def planted(*arguments, **options) -> str:
    return replace(PROGRAM, *arguments, **options)


def changed(old: str, new: str) -> str:
    """The program after the one replacement in its text."""
    assert PROGRAM.count(old) == 1
    return ast.unparse(ast.parse(PROGRAM.replace(old, new)))


@pytest.mark.parametrize(
    ("pattern", "replacement", "old", "new"),
    [
        ("A - B", "B - A", "logits.float() - scale.float()", "scale.float() - logits.float()"),
        ("A - _", "A", "logits.float() - scale.float()", "logits.float()"),
        ("A.float() - B.float()", "(A - B).float()", "logits.float() - scale.float()", "(logits - scale).float()"),
        ("_.clear(...)", "pass", "self.run.clear(now=True)", "pass"),
        ("A.clear(...)", "A.clear()", "self.run.clear(now=True)", "self.run.clear()"),
        ("A > 2", "A > 3", "self.size > 2", "self.size > 3"),
        ("_ and A", "A", "self.size > 2 and gap", "gap"),
        ("if _: ...", "if True: ...", "self.size > 2 and gap", "True"),
        ("reversed(A)", "A", "reversed(range(3))", "range(3)"),
        ("for A in _: ...", "for A in (): ...", "reversed(range(3))", "()"),
        ("keep(..., shift=_)", "keep(..., shift=True)", "row, eps=EPS, shift=False", "row, eps=EPS, shift=True"),
        ("keep(A, ...)", "keep(...)", "keep(gap, row, eps", "keep(row, eps"),
        ("return A", "return -A", "return gap", "return -gap"),
        (
            "for _ in _: ...",
            "",
            "        for row in reversed(range(3)):\n            gap = keep(gap, row, eps=EPS, shift=False)\n",
            "",
        ),
    ],
)
def test_the_piece_with_this_shape_is_replaced(pattern: str, replacement: str, old: str, new: str) -> None:
    assert planted("Sampler.draw", pattern, replacement) == changed(old, new)


@pytest.mark.parametrize(
    ("where", "pattern", "replacement", "old", "new"),
    [
        ("", "EPS = _", "EPS = 0.0", "1e-8", "0.0"),
        ("Sampler", "A = 4", "A = 5", "size = 4", "size = 5"),
        ("draw", "A - 1", "A + 1", "logits - 1", "logits + 1"),
    ],
)
def test_a_place_is_a_module_a_class_or_a_function(where, pattern, replacement, old, new) -> None:
    assert planted(where, pattern, replacement) == changed(old, new)


def test_one_of_several_is_chosen_by_its_number() -> None:
    assert planted("Sampler.draw", "A.float()", "A", nth=1) == changed("scale.float()", "scale")


def test_a_letter_may_be_explained_by_another_piece() -> None:
    assert planted("Sampler.draw", "return _", "return A", given="A.float() - _") == changed(
        "return gap", "return logits"
    )


def test_neither_names_of_locals_nor_layout_matter() -> None:
    renamed = "def draw(x):\n    return (x\n        - 1)  # why"
    assert replace(renamed, "draw", "A - 1", "A") == "def draw(x):\n    return x"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("Sampler.draw", "A * B", "A"), "Sampler.draw has 0 pieces like `A * B`, not one"),
        (("Sampler.draw", "A.float()", "A"), "Sampler.draw has 2 pieces like `A.float()`, not one"),
        (("Sampler.draw", "A.float()", "A", 2), "Sampler.draw has 2 pieces like `A.float()`, not 3 or more"),
        (("Sampler.draw", "A - B", "C"), "the pattern does not say what C is"),
        (("Sampler.draw", "A - B", "A - B"), "`A - B` changes nothing"),
        (("Sampler.draw", "return A", "return B", None, "B.float()"), "2 pieces like `B.float()`, not one"),
        (("Sampler.drew", "A - B", "A"), "0 functions or classes, not one, are called Sampler.drew"),
        (("", "A - B", "A"), "the module has 0 pieces"),
        (("Sampler.draw", "A -", "A"), "'A -' is no Python"),
    ],
)
def test_a_place_that_is_gone_or_not_clear_is_told(arguments, why: str) -> None:
    with pytest.raises(CannotPlant) as told:
        planted(*arguments)
    assert why in str(told.value)


@pytest.mark.parametrize(
    "pattern", ["A + A", "f(A, A)", "f(A, B, C)", "f(A)", "g(A, B)", "f(..., key=A)", "A - B", "B.f(_, _)", "f(x, y)"]
)
def test_another_shape_is_not_found(pattern: str) -> None:
    with pytest.raises(CannotPlant, match="has 0 pieces"):
        replace("f(a, b)\na + b", "", pattern, "None")
